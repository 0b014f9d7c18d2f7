//! Token buckets: how many bytes and frames may pass in one direction.
//!
//! A frame is let through whole as soon as every bucket has a token, and is paid for afterwards, so a bucket
//! may owe up to one frame: no frame is ever too large for its bucket, and over time the rate is exact.
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

use std::time::{Duration, Instant};

use crate::vmm::spec::{Rate, RateLimit};

const NANOSECONDS: u128 = 1_000_000_000;

/// The buckets of one direction.
#[derive(Debug, Default)]
pub struct Limiter {
    bytes: Option<Bucket>,
    frames: Option<Bucket>,
}

impl Limiter {
    /// Full buckets.
    pub fn new(limit: RateLimit) -> Self {
        let now = Instant::now();
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate, now));
        Self {
            bytes: bucket(limit.bytes),
            frames: bucket(limit.frames),
        }
    }

    /// Pays for what has passed. Returns how long nothing may pass; none: the next may.
    pub fn charge(&mut self, bytes: u32, frames: u32) -> Option<Duration> {
        if self.bytes.is_none() && self.frames.is_none() {
            return None;
        }
        self.charge_at(Instant::now(), bytes, frames)
    }

    fn charge_at(&mut self, now: Instant, bytes: u32, frames: u32) -> Option<Duration> {
        let charge = |bucket: &mut Option<Bucket>, tokens: u32| {
            let bucket = bucket.as_mut()?;
            bucket.charge(now, tokens);
            bucket.wait()
        };
        // The later of the two; none is before any.
        charge(&mut self.bytes, bytes).max(charge(&mut self.frames, frames))
    }
}

#[derive(Debug)]
struct Bucket {
    rate: Rate,
    /// Tokens; negative while the last frame is not paid for.
    balance: i64,
    /// Until when the balance has been credited.
    credited: Instant,
}

impl Bucket {
    fn new(rate: Rate, now: Instant) -> Self {
        Self {
            rate,
            balance: i64::try_from(rate.burst).unwrap_or(i64::MAX),
            credited: now,
        }
    }

    fn charge(&mut self, now: Instant, tokens: u32) {
        self.credit(now);
        self.balance = self.balance.saturating_sub(tokens.into());
    }

    fn credit(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.credited).as_nanos();
        let rate = u128::from(self.rate.per_second);
        let tokens = elapsed.saturating_mul(rate) / NANOSECONDS;
        if tokens == 0 {
            return;
        }
        let most = i64::try_from(self.rate.burst).unwrap_or(i64::MAX);
        let tokens_now = i64::try_from(tokens).unwrap_or(i64::MAX);
        self.balance = self.balance.saturating_add(tokens_now).min(most);
        // What is less than a token stays to be credited.
        let paid = tokens.saturating_mul(NANOSECONDS).checked_div(rate);
        let paid = paid.and_then(|ns| u64::try_from(ns).ok());
        self.credited = paid
            .and_then(|ns| self.credited.checked_add(Duration::from_nanos(ns)))
            .unwrap_or(now);
    }

    fn wait(&self) -> Option<Duration> {
        let missing = 1i64.saturating_sub(self.balance);
        let missing = u128::try_from(missing).ok().filter(|tokens| *tokens > 0)?;
        let rate = u128::from(self.rate.per_second).max(1);
        let ns = missing.saturating_mul(NANOSECONDS).div_ceil(rate);
        Some(Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn limiter(bytes: Option<(u64, u64)>, frames: Option<(u64, u64)>) -> Limiter {
        let rate = |(per_second, burst)| Rate { per_second, burst };
        Limiter::new(RateLimit {
            bytes: bytes.map(rate),
            frames: frames.map(rate),
        })
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        assert_eq!(limiter(None, None).charge(u32::MAX, u32::MAX), None);
    }

    #[test]
    fn a_burst_passes_and_what_follows_waits_for_the_rate() {
        let mut limiter = limiter(Some((1000, 500)), None);
        let start = limiter.bytes.as_ref().unwrap().credited;
        assert_eq!(limiter.charge_at(start, 499, 1), None);
        // One token was left: the frame passes whole, and is paid for later.
        let wait = limiter.charge_at(start, 1000, 1).unwrap();
        assert_eq!(wait, Duration::from_secs(1));
        assert!(
            limiter
                .charge_at(start + wait - Duration::from_millis(1), 0, 0)
                .is_some()
        );
        assert_eq!(limiter.charge_at(start + wait, 0, 0), None);
    }

    #[test]
    fn the_longer_wait_counts() {
        let mut limiter = limiter(Some((1_000_000, 1)), Some((10, 1)));
        let start = limiter.bytes.as_ref().unwrap().credited;
        assert_eq!(
            limiter.charge_at(start, 1500, 1),
            Some(Duration::from_millis(100))
        );
    }

    proptest! {
        /// Whatever the sizes and pauses, no more passes in a time than burst, rate and one frame allow, and
        /// one that waits as long as it is told gets the whole rate.
        #[test]
        fn the_rate_holds(
            per_second in 1_000..10_000_000u64,
            burst in 1..1_000_000u64,
            sizes in prop::collection::vec(1..65_536u32, 1..200),
        ) {
            let mut limiter = limiter(Some((per_second, burst)), None);
            let start = limiter.bytes.as_ref().unwrap().credited;
            let mut now = start;
            let mut passed = 0;
            let last = sizes[sizes.len() - 1];
            for size in sizes {
                passed += u64::from(size);
                now += limiter.charge_at(now, size, 1).unwrap_or_default();
            }
            let seconds = (now - start).as_secs_f64();
            let allowed = burst as f64 + seconds * per_second as f64;
            prop_assert!(passed as f64 <= allowed + 2.0, "{passed} in {seconds} s");
            prop_assert!(now == start || passed as f64 >= allowed - 2.0 - f64::from(last) );
        }
    }
}
