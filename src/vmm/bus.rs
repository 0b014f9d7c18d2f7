//! The buses: which device answers at which guest-physical address or I/O port.
//!
//! A bus is built while the machine is built and frozen when the vCPUs start: vCPU threads read it
//! through an `Arc` and take no lock of the bus's own. A device that a vCPU thread can reach keeps its
//! own interior state behind its own lock.
#![forbid(unsafe_code)]

use std::sync::Arc;

/// A device on a bus, reached by vCPU threads when the guest accesses its window.
///
/// `offset` is relative to the device's first address. `data` is 1, 2, 4 or 8 bytes long. An access the
/// device does not define reads as zeroes and writes nothing; it never panics.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes what the guest wrote at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A window on a [`Bus`].
struct Window {
    start: u64,
    size: u64,
    device: Arc<dyn BusDevice>,
}

/// Devices by address, frozen: sorted windows that do not overlap.
pub struct Bus {
    windows: Vec<Window>,
}

/// Collects the devices of a [`Bus`].
#[derive(Default)]
pub struct BusBuilder {
    windows: Vec<Window>,
}

/// Two devices claim the same address: a mistake in the machine's layout.
#[derive(Debug, thiserror::Error)]
#[error("two devices overlap at guest-physical address {0:#x}")]
pub struct Overlap(u64);

impl BusBuilder {
    /// Adds a device at `start`, `size` bytes long.
    pub fn add(&mut self, start: u64, size: u64, device: Arc<dyn BusDevice>) {
        self.windows.push(Window {
            start,
            size,
            device,
        });
    }

    /// Freezes the bus.
    ///
    /// # Errors
    /// [`Overlap`] if windows overlap.
    pub fn freeze(mut self) -> Result<Bus, Overlap> {
        self.windows.sort_by_key(|window| window.start);
        for pair in self.windows.windows(2) {
            if let [first, second] = pair
                && first.start.saturating_add(first.size) > second.start
            {
                return Err(Overlap(second.start));
            }
        }
        Ok(Bus {
            windows: self.windows,
        })
    }
}

impl Bus {
    /// The device at `address` and the offset in its window.
    pub fn find(&self, address: u64) -> Option<(&dyn BusDevice, u64)> {
        let after = self
            .windows
            .partition_point(|window| window.start <= address);
        let window = self.windows.get(after.checked_sub(1)?)?;
        let offset = address - window.start;
        (offset < window.size).then(|| (&*window.device, offset))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(u8);

    impl BusDevice for Constant {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + offset as u8);
        }

        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn bus(windows: &[(u64, u64)]) -> Result<Bus, Overlap> {
        let mut builder = BusBuilder::default();
        for (i, (start, size)) in windows.iter().enumerate() {
            builder.add(*start, *size, Arc::new(Constant(10 * i as u8)));
        }
        builder.freeze()
    }

    #[test]
    fn an_access_reaches_its_device_with_its_offset() {
        let bus = bus(&[(0x2000, 0x100), (0x1000, 0x1000)]).unwrap();
        let read = |address| {
            bus.find(address).map(|(device, offset)| {
                let mut data = [0];
                device.read(offset, &mut data);
                data[0]
            })
        };
        assert_eq!(read(0xfff), None);
        assert_eq!((read(0x1000), read(0x1001)), (Some(10), Some(11)));
        assert_eq!((read(0x2001), read(0x2100)), (Some(1), None));
        assert_eq!(read(u64::MAX), None);
    }

    #[test]
    fn overlapping_windows_are_refused() {
        assert!(bus(&[(0, 16), (15, 1)]).is_err());
        assert!(bus(&[(u64::MAX - 20, 16), (u64::MAX - 16, 1)]).is_err());
    }
}
