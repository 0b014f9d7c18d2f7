//! A handler that takes chains only when it has something for them, as vsock and net receive queues do.
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use cube::vmm::memory::GuestMemory;
use cube::vmm::virtio::chain::Chain;
use cube::vmm::virtio::drain::{Drain, Effects, Failure, Outcome, QueueHandler, TURN_CHAINS};
use cube::vmm::virtio::{Activation, Active, HostError, Interest, VirtioDevice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::driver::{Buffer, Driver, F_EVENT_IDX, F_VERSION_1, status};

const RX: u16 = 0;
const TX: u16 = 1;

/// Echoes: each chain on queue 1 makes one byte for queue 0; the host can make more through an eventfd.
struct Echo {
    host: EventFd,
    /// What is there for the guest.
    ready: u32,
    /// Says that it wants a chain even when it has nothing, and puts it back.
    tries: bool,
    put_back: Arc<AtomicU32>,
}

impl QueueHandler for Echo {
    fn wants(&self, queue: u16) -> bool {
        queue == TX || self.tries || self.ready > 0
    }

    fn handle(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        if chain.queue() == TX {
            self.ready += 1;
            effects.run(RX);
            return Ok(Outcome::Done(0));
        }
        if self.ready == 0 {
            self.put_back.fetch_add(1, Ordering::SeqCst);
            // Asking for the queue in the same breath must not spin.
            effects.run(RX);
            return Ok(Outcome::PutBack);
        }
        self.ready -= 1;
        chain.writable.write(memory, 0, b"!")?;
        Ok(Outcome::Done(1))
    }

    fn interests(&self) -> Vec<Interest> {
        vec![Interest {
            fd: self.host.as_raw_fd(),
            token: 9,
            readable: true,
            writable: false,
            edge_triggered: false,
        }]
    }

    fn ready(
        &mut self,
        _memory: &GuestMemory,
        token: u32,
        effects: &mut Effects,
    ) -> Result<(), Failure> {
        assert_eq!(token, 9);
        self.ready += self.host.read().unwrap() as u32;
        effects.run(RX);
        Ok(())
    }
}

/// A device of two queues around any handler.
pub struct Device<H> {
    pub handler: Option<H>,
    pub queue_sizes: [u16; 2],
}

impl<H: QueueHandler> VirtioDevice for Device<H> {
    fn device_type(&self) -> u32 {
        42
    }

    fn name(&self) -> String {
        "test".into()
    }

    fn features(&self) -> u64 {
        F_VERSION_1 | F_EVENT_IDX
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Active>, HostError> {
        Ok(Box::new(Drain::new(
            activation,
            self.handler.take().unwrap(),
        )))
    }

    fn reset(&mut self, stopped: Box<dyn Active>) {
        self.handler = Drain::into_handler(stopped);
    }
}

fn echo(tries: bool) -> (Driver, EventFd, Arc<AtomicU32>) {
    let host = EventFd::new(EFD_NONBLOCK).unwrap();
    let put_back = Arc::<AtomicU32>::default();
    let handler = Echo {
        host: host.try_clone().unwrap(),
        ready: 0,
        tries,
        put_back: put_back.clone(),
    };
    let device = Device {
        handler: Some(handler),
        queue_sizes: [16; 2],
    };
    (Driver::new(Box::new(device)), host, put_back)
}

#[test]
fn a_queue_that_nobody_wants_rests_and_wakes_when_it_is_asked_for() {
    for tries in [false, true] {
        for features in [F_VERSION_1, F_VERSION_1 | F_EVENT_IDX] {
            let (mut driver, host, put_back) = echo(tries);
            let mut queues = driver.start_with(features, &[16, 16]);
            let rx: Vec<u16> = (0..8)
                .map(|_| {
                    let at = driver.alloc(1);
                    queues[0].add(&[Buffer::write(at, 1)])
                })
                .collect();
            driver.kick(0);
            driver.settle();
            assert_eq!(queues[0].used_index(), 0);
            assert_eq!(put_back.load(Ordering::SeqCst) > 0, tries);
            // From the host: in the order in which the buffers were offered.
            host.write(2).unwrap();
            assert_eq!(driver.wait_used(&mut queues[0]), (rx[0], 1));
            assert_eq!(driver.wait_used(&mut queues[0]), (rx[1], 1));
            // From the other queue.
            let at = driver.alloc(1);
            driver.call(1, &mut queues[1], &[Buffer::read(at, 1)]);
            assert_eq!(driver.wait_used(&mut queues[0]), (rx[2], 1));
            driver.settle();
            assert_eq!(queues[0].used_index(), 3);
            // More than there are buffers for; the rest goes into the next ones, which need a kick.
            host.write(7).unwrap();
            for head in &rx[3..] {
                assert_eq!(driver.wait_used(&mut queues[0]), (*head, 1));
            }
            driver.settle();
            assert!(!features & F_EVENT_IDX != 0 || queues[0].avail_event() == 8);
            for _ in 0..2 {
                let at = driver.alloc(1);
                let head = queues[0].add(&[Buffer::write(at, 1)]);
                driver.kick(0);
                assert_eq!(driver.wait_used(&mut queues[0]), (head, 1));
            }
            assert_eq!(driver.counters.snapshot().requests, 11);
            assert_eq!(driver.status() & status::NEEDS_RESET, 0);
        }
    }
}

#[test]
fn what_the_handler_holds_survives_a_reset_of_the_device() {
    let (mut driver, host, _) = echo(false);
    driver.start(&[16, 16]);
    host.write(1).unwrap();
    driver.settle();
    driver.reset();
    let mut queues = driver.start(&[16, 16]);
    let at = driver.alloc(1);
    // Without a kick from the host's side or a second one: the handler has something since before.
    let written = driver.call(0, &mut queues[0], &[Buffer::write(at, 1)]);
    assert_eq!((written, driver.bytes(at, 1)), (1, b"!".to_vec()));
}

/// Writes down which queue each chain came from.
struct Witness(Arc<Mutex<Vec<u16>>>);

impl QueueHandler for Witness {
    fn handle(
        &mut self,
        _memory: &GuestMemory,
        chain: &mut Chain,
        _effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        self.0.lock().unwrap().push(chain.queue());
        Ok(Outcome::Done(0))
    }
}

#[test]
fn a_full_queue_does_not_starve_its_sibling() {
    let seen = Arc::<Mutex<Vec<u16>>>::default();
    let device = Device {
        handler: Some(Witness(seen.clone())),
        queue_sizes: [256; 2],
    };
    let mut driver = Driver::new(Box::new(device));
    assert!(driver.negotiate(F_VERSION_1));
    let mut full = driver.queue(0, 256);
    let mut single = driver.queue(1, 256);
    let at = driver.alloc(1);
    for _ in 0..256 {
        full.add(&[Buffer::read(at, 1)]);
    }
    single.add(&[Buffer::read(at, 1)]);
    driver.add_status(status::DRIVER_OK);
    driver.wait_used(&mut single);
    for _ in 0..256 {
        driver.wait_used(&mut full);
    }
    let seen = seen.lock().unwrap();
    let turn = seen.iter().position(|queue| *queue == 1);
    assert_eq!((seen.len(), turn), (257, Some(TURN_CHAINS as usize)));
}
