//! What the driver sees of a turn, and when.
use std::sync::{Arc, Mutex, OnceLock};

use cube::vmm::memory::GuestMemory;
use cube::vmm::virtio::chain::Chain;
use cube::vmm::virtio::drain::{Effects, Failure, Outcome, QueueHandler};

use crate::driver::{Buffer, Driver, DriverQueue, F_VERSION_1, status};
use crate::holding::Device;

/// Where the handler is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Handle,
    Served,
}

/// Keeps the last chain back until all have been served, and writes down what the driver sees at each call.
struct Batch {
    view: Arc<OnceLock<DriverQueue>>,
    seen: Arc<Mutex<Vec<(Call, u16)>>>,
    kept: Option<Chain>,
}

impl Batch {
    fn note(&self, call: Call) {
        let used = self.view.get().unwrap().used_index();
        self.seen.lock().unwrap().push((call, used));
    }
}

impl QueueHandler for Batch {
    fn handle(
        &mut self,
        _memory: &GuestMemory,
        chain: &mut Chain,
        effects: &mut Effects,
    ) -> Result<Outcome, Failure> {
        self.note(Call::Handle);
        if let Some(kept) = self.kept.replace(std::mem::take(chain)) {
            effects.complete(kept.queue(), kept.head(), 0);
        }
        Ok(Outcome::Pending)
    }

    fn served(&mut self, _memory: &GuestMemory, effects: &mut Effects) -> Result<(), Failure> {
        self.note(Call::Served);
        if let Some(kept) = self.kept.take() {
            effects.complete(kept.queue(), kept.head(), 0);
        }
        Ok(())
    }
}

#[test]
fn what_is_completed_in_a_turn_is_seen_at_its_end() {
    let (view, seen) = (Arc::<OnceLock<_>>::default(), Arc::<Mutex<_>>::default());
    let device = Device {
        handler: Some(Batch {
            view: view.clone(),
            seen: seen.clone(),
            kept: None,
        }),
        queue_sizes: [16; 2],
    };
    let mut driver = Driver::new(Box::new(device));
    assert!(driver.negotiate(F_VERSION_1));
    let mut queue = driver.queue(0, 16);
    driver.queue(1, 16);
    view.set(queue.clone_view()).ok().unwrap();
    let at = driver.alloc(1);
    let heads: Vec<_> = (0..5).map(|_| queue.add(&[Buffer::read(at, 1)])).collect();
    driver.add_status(status::DRIVER_OK);
    driver.wait_interrupt();
    // One interrupt told of all, the one completed last included.
    assert_eq!(queue.used_index(), 5);
    for head in heads {
        assert_eq!(queue.pop_used(), Some((head, 0)));
    }
    let calls = [[(Call::Handle, 0); 5].as_slice(), &[(Call::Served, 0)]].concat();
    assert_eq!(seen.lock().unwrap()[..6], calls);
}
