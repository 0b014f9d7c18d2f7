//! Requests in flight: a backend that completes when the test says so.
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex};

use cube::vmm::virtio::Interest;
use cube::vmm::virtio::blk::{Backend, Blk, Op, Tag};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::disk::{IN, IOERR, OK, header};
use crate::driver::{Buffer, Driver, DriverQueue, status};

/// Keeps every request until its gate opens.
struct Gated {
    gate: EventFd,
    held: Arc<Mutex<Vec<Tag>>>,
}

impl Backend for Gated {
    fn len(&self) -> u64 {
        1 << 20
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn submit(&mut self, tag: Tag, _op: Op<'_>) -> Option<io::Result<()>> {
        self.held.lock().unwrap().push(tag);
        None
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest {
            fd: self.gate.as_raw_fd(),
            token: 1,
            readable: true,
            writable: false,
            edge_triggered: false,
        }]
    }

    fn ready(&mut self, token: u32, done: &mut Vec<(Tag, io::Result<()>)>) {
        assert_eq!(token, 1);
        self.gate.read().unwrap();
        // The last first.
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        done.extend(held.into_iter().rev().map(|tag| (tag, Ok(()))));
    }

    fn quiesce(&mut self, done: &mut Vec<(Tag, io::Result<()>)>) {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        let cancelled = || Err(io::Error::other("cancelled"));
        done.extend(held.into_iter().map(|tag| (tag, cancelled())));
    }
}

struct GatedDriver {
    driver: Driver,
    queue: DriverQueue,
    gate: EventFd,
    held: Arc<Mutex<Vec<Tag>>>,
}

impl GatedDriver {
    fn new() -> Self {
        let gate = EventFd::new(EFD_NONBLOCK).unwrap();
        let held = Arc::<Mutex<Vec<Tag>>>::default();
        let backend = Gated {
            gate: gate.try_clone().unwrap(),
            held: held.clone(),
        };
        let blk = Blk::with_backend("gated".into(), backend, 1);
        let driver = Driver::new(Box::new(blk));
        let queue = driver.start(&[16]).remove(0);
        Self {
            driver,
            queue,
            gate,
            held,
        }
    }

    /// Offers a read of one sector: its head and where its status will be.
    fn offer(&mut self) -> (u16, u64) {
        let head = self.driver.alloc_with(&header(IN, 0));
        let back = self.driver.alloc(513);
        self.driver.memory_fill(back, 513, 0xee);
        let buffers = [Buffer::read(head, 16), Buffer::write(back, 513)];
        (self.queue.add(&buffers), back + 512)
    }

    fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    fn start_again(&mut self) {
        self.driver.reset();
        self.queue = self.driver.start(&[16]).remove(0);
    }

    /// A request goes in and comes out.
    fn still_works(&mut self) {
        let (head, status) = self.offer();
        self.driver.kick(0);
        self.driver.settle();
        assert_eq!(self.held(), 1);
        self.gate.write(1).unwrap();
        assert_eq!(self.driver.wait_used(&mut self.queue), (head, 513));
        assert_eq!(self.driver.bytes(status, 1), [OK]);
    }
}

#[test]
fn requests_complete_later_and_in_any_order() {
    let mut gated = GatedDriver::new();
    let offered: Vec<_> = (0..8).map(|_| gated.offer()).collect();
    gated.driver.kick(0);
    gated.driver.settle();
    assert_eq!((gated.held(), gated.queue.used_index()), (8, 0));
    gated.gate.write(1).unwrap();
    for (head, status) in offered.iter().rev() {
        assert_eq!(gated.driver.wait_used(&mut gated.queue), (*head, 513));
        assert_eq!(gated.driver.bytes(*status, 1), [OK]);
    }
    gated.still_works();
}

#[test]
fn a_reset_in_mid_io_ends_what_is_in_flight_before_it_returns() {
    let mut gated = GatedDriver::new();
    for _ in 0..10 {
        let offered: Vec<_> = (0..8).map(|_| gated.offer()).collect();
        gated.driver.kick(0);
        gated.driver.settle();
        assert_eq!(gated.held(), 8);
        gated.driver.write(crate::driver::reg::STATUS, 0);
        assert_eq!(gated.driver.status(), 0);
        assert_eq!(gated.held(), 0);
        for (_, status) in &offered {
            assert_eq!(gated.driver.bytes(*status, 1), [IOERR]);
        }
        // Completions of the past have no one to go to.
        for (_, status) in &offered {
            gated.driver.memory_fill(*status, 1, 0x77);
        }
        gated.gate.write(1).unwrap();
        gated.start_again();
        gated.driver.settle();
        for (_, status) in &offered {
            assert_eq!(gated.driver.bytes(*status, 1), [0x77]);
        }
    }
    gated.still_works();
}

#[test]
fn a_head_that_the_device_has_already_breaks_it() {
    let mut gated = GatedDriver::new();
    let (head, _) = gated.offer();
    gated.queue.offer(head);
    gated.driver.kick(0);
    gated.driver.wait_needs_reset();
    gated.start_again();
    gated.still_works();

    // Also when the first is in flight since an earlier turn.
    let (head, _) = gated.offer();
    gated.driver.kick(0);
    gated.driver.settle();
    assert_eq!(gated.driver.status() & status::NEEDS_RESET, 0);
    gated.queue.offer(head);
    gated.driver.kick(0);
    gated.driver.wait_needs_reset();
    gated.start_again();
    gated.still_works();
}

#[test]
fn a_detach_in_mid_io_gives_the_device_back_whole() {
    let mut gated = GatedDriver::new();
    gated.offer();
    gated.driver.kick(0);
    gated.driver.settle();
    let device = gated.driver.slot.detach().unwrap();
    assert_eq!(gated.held(), 0);
    assert!(gated.driver.slot.attach(device).is_ok());
    gated.start_again();
    gated.still_works();
}
