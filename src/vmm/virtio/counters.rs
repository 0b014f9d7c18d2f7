//! What a device has done, counted by its worker and read by any thread.
#![forbid(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::sync::atomic::{AtomicU64, Ordering};

/// Monotonic counters of one device; relaxed atomics, because each is a number of its own.
#[derive(Debug, Default)]
pub struct Counters {
    requests: AtomicU64,
    bytes_from_guest: AtomicU64,
    bytes_to_guest: AtomicU64,
    faults: AtomicU64,
    errors: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct CountersSnapshot {
    /// Descriptor chains taken from the available rings.
    pub requests: u64,
    /// Bytes in the device-readable parts of those chains.
    pub bytes_from_guest: u64,
    /// Bytes written into device-writable buffers.
    pub bytes_to_guest: u64,
    /// What the guest did wrong: malformed chains, rings, requests and register accesses.
    pub faults: u64,
    /// Requests that failed for a reason on the host, such as an I/O error.
    pub errors: u64,
}

impl Counters {
    /// Counts a chain with `bytes` device-readable bytes.
    pub fn request(&self, bytes: u32) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.bytes_from_guest
            .fetch_add(bytes.into(), Ordering::Relaxed);
    }

    /// Counts `bytes` written for the guest.
    pub fn completion(&self, bytes: u32) {
        self.bytes_to_guest
            .fetch_add(bytes.into(), Ordering::Relaxed);
    }

    /// Counts something that the guest did wrong.
    pub fn fault(&self) {
        self.faults.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a request that failed for a reason on the host.
    pub fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// The counters now.
    pub fn snapshot(&self) -> CountersSnapshot {
        CountersSnapshot {
            requests: self.requests.load(Ordering::Relaxed),
            bytes_from_guest: self.bytes_from_guest.load(Ordering::Relaxed),
            bytes_to_guest: self.bytes_to_guest.load(Ordering::Relaxed),
            faults: self.faults.load(Ordering::Relaxed),
            errors: self.errors.load(Ordering::Relaxed),
        }
    }
}
