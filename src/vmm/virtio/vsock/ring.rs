//! Bytes that wait for a slow socket: a ring of fixed size, and a few kept for reuse.
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

/// Rings kept for the next stream whose socket is slower than the guest.
const SPARE_RINGS: usize = 4;

/// A first-in first-out of bytes. Its memory is taken from the operating system page by page as it is
/// touched, and never grows.
#[derive(Debug, Default)]
pub struct Ring {
    memory: Box<[u8]>,
    /// Where the first byte is.
    head: usize,
    len: usize,
}

impl Ring {
    fn new(capacity: usize) -> Self {
        Self {
            memory: vec![0; capacity].into_boxed_slice(),
            head: 0,
            len: 0,
        }
    }

    /// Bytes that wait.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether no byte waits.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that it can hold in all.
    pub fn capacity(&self) -> usize {
        self.memory.len()
    }

    /// The first bytes, as many as lie together: not empty unless the ring is.
    pub fn front(&self) -> &[u8] {
        let rest = self.memory.get(self.head..).unwrap_or_default();
        rest.get(..self.len).unwrap_or(rest)
    }

    /// Drops the first `count` bytes.
    pub fn consume(&mut self, count: usize) {
        let count = count.min(self.len);
        self.len = self.len.saturating_sub(count);
        self.head = self.wrap(self.head.saturating_add(count));
        if self.len == 0 {
            // From the start again, so that a ring that fills little touches little.
            self.head = 0;
        }
    }

    /// Appends `count` bytes, which the caller writes into the two parts returned, the first one first;
    /// none if there is no space for them.
    pub fn append(&mut self, count: usize) -> Option<(&mut [u8], &mut [u8])> {
        if count > self.capacity().saturating_sub(self.len) {
            return None;
        }
        let start = self.wrap(self.head.saturating_add(self.len));
        self.len = self.len.saturating_add(count);
        let (low, high) = self.memory.split_at_mut_checked(start)?;
        if count <= high.len() {
            return Some((high.get_mut(..count)?, &mut []));
        }
        let second = low.get_mut(..count.saturating_sub(high.len()))?;
        Some((high, second))
    }

    /// An index less than twice the capacity, brought into the ring.
    fn wrap(&self, index: usize) -> usize {
        index.checked_sub(self.capacity()).unwrap_or(index)
    }
}

/// Rings without bytes, so that a stream that fills and drains its own over and over does not allocate
/// each time, and one at rest holds none.
#[derive(Debug, Default)]
pub struct SpareRings {
    rings: Vec<Ring>,
}

impl SpareRings {
    /// An empty ring for at least `capacity` bytes.
    pub fn take(&mut self, capacity: usize) -> Ring {
        let fits = |ring: &Ring| ring.capacity() >= capacity;
        match self.rings.iter().position(fits) {
            Some(at) => self.rings.swap_remove(at),
            None => Ring::new(capacity),
        }
    }

    /// Gives a ring back; bytes in it are lost.
    pub fn give(&mut self, mut ring: Ring) {
        if ring.capacity() > 0 && self.rings.len() < SPARE_RINGS {
            ring.consume(ring.len());
            self.rings.push(ring);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_queue(
            capacity in 1usize..40,
            steps in proptest::collection::vec((any::<bool>(), 0usize..50), 0..200),
        ) {
            let mut ring = Ring::new(capacity);
            let mut model = VecDeque::new();
            let mut next = 0u8;
            for (append, count) in steps {
                if append {
                    let fits = model.len() + count <= capacity;
                    let parts = ring.append(count);
                    prop_assert_eq!(parts.is_some(), fits);
                    if let Some((first, second)) = parts {
                        prop_assert_eq!(first.len() + second.len(), count);
                        for byte in first.iter_mut().chain(second) {
                            *byte = next;
                            model.push_back(next);
                            next = next.wrapping_add(1);
                        }
                    }
                } else {
                    let front = ring.front().to_vec();
                    prop_assert_eq!(front.is_empty(), model.is_empty());
                    prop_assert!(model.iter().zip(&front).all(|(a, b)| a == b));
                    let count = count.min(front.len());
                    ring.consume(count);
                    model.drain(..count);
                }
                prop_assert_eq!(ring.len(), model.len());
            }
        }
    }

    #[test]
    fn spare_rings_are_reused_when_they_are_large_enough() {
        let mut spare = SpareRings::default();
        let mut ring = spare.take(64);
        ring.append(10).unwrap();
        spare.give(ring);
        assert_eq!(spare.take(128).capacity(), 128);
        let ring = spare.take(32);
        assert_eq!((ring.capacity(), ring.len()), (64, 0));
        for _ in 0..10 {
            spare.give(Ring::new(8));
        }
        assert_eq!(spare.rings.len(), SPARE_RINGS);
    }
}
