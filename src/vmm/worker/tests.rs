//! The worker with devices that follow a script.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::mpsc::{Receiver, Sender, channel};

use super::*;
use crate::vmm::virtio::Turn;

type Answer = Box<dyn FnMut(&mut Vec<Interest>, u32) -> Result<Turn, HostError> + Send>;

/// Reports each call, and answers as told.
struct Scripted {
    fds: Vec<Interest>,
    calls: Sender<u32>,
    answer: Answer,
    quiesced: bool,
}

impl Active for Scripted {
    fn interests(&self) -> Vec<Interest> {
        self.fds.clone()
    }

    fn ready(&mut self, token: u32) -> Result<Turn, HostError> {
        self.calls.send(token).unwrap();
        (self.answer)(&mut self.fds, token)
    }

    fn quiesce(&mut self) {
        self.quiesced = true;
    }
}

fn scripted(
    fds: Vec<Interest>,
    answer: impl FnMut(&mut Vec<Interest>, u32) -> Result<Turn, HostError> + Send + 'static,
) -> (Box<dyn Active>, Receiver<u32>) {
    let (calls, log) = channel();
    let device = Scripted {
        fds,
        calls,
        answer: Box::new(answer),
        quiesced: false,
    };
    (Box::new(device), log)
}

fn worker() -> Worker {
    Worker::spawn("test-worker", || Ok(())).unwrap()
}

fn readable(fd: &OwnedFd, token: u32) -> Interest {
    Interest {
        fd: fd.as_raw_fd(),
        token,
        readable: true,
        writable: false,
        edge_triggered: false,
    }
}

fn signalled() -> OwnedFd {
    eventfd(1, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

fn was_quiesced(active: Box<dyn Active>) -> bool {
    let any: Box<dyn std::any::Any> = active;
    any.downcast::<Scripted>().unwrap().quiesced
}

#[test]
fn a_device_is_resumed_once_after_adoption_and_again_while_it_asks() {
    let worker = worker();
    let mut left = 3;
    let (device, log) = scripted(Vec::new(), move |_, _| {
        left -= 1;
        Ok(Turn {
            again: left > 0,
            rearm: false,
        })
    });
    let token = worker.handle().adopt(device).unwrap();
    assert_eq!(log.iter().take(3).collect::<Vec<_>>(), [RESUME; 3]);
    assert!(was_quiesced(worker.handle().release(token).unwrap()));
    // The device is gone, its end of the log with it: no fourth call was made.
    assert_eq!(log.iter().count(), 0);
}

#[test]
fn a_busy_device_does_not_starve_another() {
    let worker = worker();
    let (busy, busy_log) = scripted(Vec::new(), |_, _| {
        Ok(Turn {
            again: true,
            rearm: false,
        })
    });
    worker.handle().adopt(busy).unwrap();
    busy_log.recv().unwrap();
    let fd = signalled();
    let (device, log) = scripted(vec![readable(&fd, 7)], |_, _| Ok(Turn::default()));
    worker.handle().adopt(device).unwrap();
    assert!(log.iter().any(|token| token == 7));
}

#[test]
fn rearm_follows_a_descriptor_that_was_closed_and_reused() {
    let worker = worker();
    let first = signalled();
    let interest = readable(&first, 1);
    let mut first = Some(first);
    let mut kept = Vec::new();
    let (device, log) = scripted(vec![interest], move |fds, token| {
        if token == 1
            && let Some(old) = first.take()
        {
            // The same number, another file, another token.
            let number = old.as_raw_fd();
            let new = signalled();
            let mut old = old;
            rustix::io::dup2(&new, &mut old).unwrap();
            assert_eq!(old.as_raw_fd(), number);
            *fds = vec![readable(&old, 2)];
            kept.push(old);
        } else if token == 2 {
            fds.clear();
        }
        Ok(Turn {
            rearm: true,
            again: false,
        })
    });
    let token = worker.handle().adopt(device).unwrap();
    let calls: Vec<u32> = log.iter().take_while(|token| *token != 2).collect();
    assert_eq!(calls.iter().filter(|token| **token == 1).count(), 1);
    worker.handle().release(token).unwrap();
}

#[test]
fn a_host_error_is_reported_and_stops_that_device_alone() {
    let worker = worker();
    let fd = signalled();
    let (failing, log) = scripted(vec![readable(&fd, 1)], |_, token| match token {
        RESUME => Ok(Turn::default()),
        _ => Err(HostError {
            device: "virtio-test".into(),
            action: "fail",
            source: io::Error::other("as asked"),
        }),
    });
    let (healthy, healthy_log) = scripted(Vec::new(), |_, _| Ok(Turn::default()));
    let token = worker.handle().adopt(failing).unwrap();
    wait_readable(worker.failure_fd());
    let failure = worker.failure().unwrap();
    assert_eq!(failure.token, Some(token));
    assert_eq!(failure.error.to_string(), "virtio-test: fail: as asked");
    assert!(worker.failure().is_none());
    // The descriptor is still readable, and the loop goes on without it.
    worker.handle().adopt(healthy).unwrap();
    healthy_log.recv().unwrap();
    assert!(was_quiesced(worker.handle().release(token).unwrap()));
    assert_eq!(log.iter().filter(|token| *token == 1).count(), 1);
}

#[test]
fn a_descriptor_that_cannot_be_polled_is_refused() {
    let worker = worker();
    let file = OwnedFd::from(tempfile::tempfile().unwrap());
    let (device, _log) = scripted(vec![readable(&file, 1)], |_, _| Ok(Turn::default()));
    let error = worker.handle().adopt(device).unwrap_err();
    assert!(matches!(error, WorkerError::Poll(_)), "{error}");
    assert!(worker.stop().is_empty());
}

#[test]
fn stop_returns_the_devices_and_later_calls_say_so() {
    let worker = worker();
    let handle = worker.handle();
    let (device, _log) = scripted(Vec::new(), |_, _| Ok(Turn::default()));
    let token = handle.adopt(device).unwrap();
    let mut owned = worker.stop();
    assert_eq!(owned.len(), 1);
    assert!(was_quiesced(owned.remove(0)));
    assert!(matches!(handle.release(token), Err(WorkerError::Stopped)));
    let (device, _log) = scripted(Vec::new(), |_, _| Ok(Turn::default()));
    assert!(matches!(handle.adopt(device), Err(WorkerError::Stopped)));
}

#[test]
fn the_hook_runs_on_the_thread_and_its_refusal_is_the_start_s() {
    let (name, seen) = channel();
    let worker = Worker::spawn("hooked", move || {
        let thread = std::thread::current();
        name.send(thread.name().unwrap().to_owned()).unwrap();
        Ok(())
    });
    assert!(worker.is_ok());
    assert_eq!(seen.recv().unwrap(), "hooked");
    let Err(error) = Worker::spawn("refused", || Err(io::Error::other("no filter"))) else {
        panic!("the hook's refusal was lost");
    };
    assert_eq!(
        error.to_string(),
        "start the worker thread refused: no filter"
    );
}

#[test]
fn the_stack_is_too_small_for_a_huge_page() {
    let (size, seen) = channel();
    let worker = Worker::spawn("small", move || {
        let here = std::ptr::from_ref(&size).addr();
        let maps = std::fs::read_to_string("/proc/self/maps")?;
        let range = |line: &str| {
            let (start, end) = line.split(' ').next()?.split_once('-')?;
            let parse = |text| usize::from_str_radix(text, 16).ok();
            Some(parse(start)?..parse(end)?)
        };
        let mut stacks = maps.lines().filter_map(range);
        let stack = stacks.find(|range| range.contains(&here)).unwrap();
        size.send(stack.len()).unwrap();
        Ok(())
    });
    assert!(worker.is_ok());
    assert!(seen.recv().unwrap() < 2 << 20);
}

fn wait_readable(fd: BorrowedFd<'_>) {
    let mut poll = [rustix::event::PollFd::new(
        &fd,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut poll, None).unwrap();
}
