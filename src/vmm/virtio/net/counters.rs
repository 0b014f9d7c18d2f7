//! What has passed and what was dropped, counted by the worker and read by any thread.
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

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident,)+) => {
        /// Frames and bytes of one device; relaxed atomics, because each is a number of its own.
        #[derive(Debug, Default)]
        pub struct NetCounters {
            $($(#[doc = $doc])+ pub $name: Count,)+
        }

        /// The counters at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
        pub struct NetCountersSnapshot {
            $($(#[doc = $doc])+ pub $name: u64,)+
        }

        impl NetCounters {
            /// The counters now.
            pub fn snapshot(&self) -> NetCountersSnapshot {
                NetCountersSnapshot { $($name: self.$name.get(),)+ }
            }
        }
    };
}

counters! {
    /// Frames given to the guest.
    received_frames,
    /// Bytes of those, without the virtio header.
    received_bytes,
    /// Frames for the guest that its filter did not want.
    received_filtered,
    /// Frames for the guest that are longer than it can take.
    received_oversized,
    /// Times that frames for the guest began to wait for the rate limit.
    received_throttled,
    /// Frames of the guest given to the host.
    sent_frames,
    /// Bytes of those, without the virtio header.
    sent_bytes,
    /// Frames of the guest with a header that makes no sense, or shorter than an Ethernet header.
    sent_malformed,
    /// Frames of the guest that are longer than the MTU allows.
    sent_oversized,
    /// Frames of the guest with a source address that is not its own.
    sent_spoofed,
    /// Frames of the guest that the host did not take.
    sent_refused,
    /// Times that frames of the guest began to wait for the rate limit.
    sent_throttled,
}

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Count(AtomicU64);

impl Count {
    /// One more.
    pub fn one(&self) {
        self.add(1);
    }

    /// That many more.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}
