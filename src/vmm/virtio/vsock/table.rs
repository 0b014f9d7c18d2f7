//! The connections of a device: by ports, by id, and in the order in which they may send.
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

use std::collections::{HashMap, VecDeque};

/// The ports that name a stream; both context ids are the device's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ports {
    /// The host's port.
    pub host: u32,
    /// The guest's port.
    pub guest: u32,
}

/// Names an entry for as long as it exists; an id of an entry removed names nothing, even when its
/// place is taken again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Id {
    index: u16,
    generation: u32,
}

impl Id {
    /// As a number of 48 bits.
    pub fn to_bits(self) -> u64 {
        u64::from(self.generation) << 16 | u64::from(self.index)
    }

    /// The inverse of [`Id::to_bits`]; the bits above are ignored.
    pub fn from_bits(bits: u64) -> Self {
        Self {
            index: bits as u16,
            generation: (bits >> 16) as u32,
        }
    }
}

/// Why an entry was not inserted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The table holds its limit.
    Full,
    /// The ports are taken.
    Taken,
}

struct Slot<T> {
    generation: u32,
    /// The index is in `turns`.
    queued: bool,
    entry: Option<(Option<Ports>, T)>,
}

/// At most `limit` entries, and a round robin of those that want to send.
pub struct Table<T> {
    limit: usize,
    used: usize,
    slots: Vec<Slot<T>>,
    vacant: Vec<u16>,
    by_ports: HashMap<Ports, u16>,
    turns: VecDeque<u16>,
    last_port: u32,
}

/// Ports that the host assigns to streams it starts: bit 30 set, bit 31 clear, as Firecracker and Cloud
/// Hypervisor assign them, away from the ports that services listen on.
const FIRST_ASSIGNED_PORT: u32 = 1 << 30;
const LAST_ASSIGNED_PORT: u32 = (1 << 31) - 1;

impl<T> Table<T> {
    /// An empty table for at most `limit` entries (and never more than 65,536).
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            used: 0,
            slots: Vec::new(),
            vacant: Vec::new(),
            by_ports: HashMap::new(),
            turns: VecDeque::new(),
            last_port: LAST_ASSIGNED_PORT,
        }
    }

    /// Entries present.
    pub fn len(&self) -> usize {
        self.used
    }

    /// Whether there is no entry.
    pub fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Whether an entry can be inserted.
    pub fn is_full(&self) -> bool {
        self.used >= self.limit
    }

    /// Adds an entry.
    ///
    /// # Errors
    /// The limit is reached, or the ports are taken; the entry is dropped.
    pub fn insert(&mut self, ports: Ports, entry: T) -> Result<Id, Refused> {
        if self.by_ports.contains_key(&ports) {
            return Err(Refused::Taken);
        }
        if self.is_full() {
            return Err(Refused::Full);
        }
        let index = match self.vacant.pop() {
            Some(index) => index,
            None => {
                let index = u16::try_from(self.slots.len()).map_err(|_| Refused::Full)?;
                self.slots.push(Slot {
                    generation: 0,
                    queued: false,
                    entry: None,
                });
                index
            }
        };
        let Some(slot) = self.slots.get_mut(usize::from(index)) else {
            return Err(Refused::Full);
        };
        slot.entry = Some((Some(ports), entry));
        self.by_ports.insert(ports, index);
        self.used = self.used.saturating_add(1);
        Ok(Id {
            index,
            generation: slot.generation,
        })
    }

    /// The entry with these ports.
    pub fn find(&self, ports: Ports) -> Option<Id> {
        let index = *self.by_ports.get(&ports)?;
        let slot = self.slots.get(usize::from(index))?;
        Some(Id {
            index,
            generation: slot.generation,
        })
    }

    /// The entry with this id.
    pub fn get_mut(&mut self, id: Id) -> Option<&mut T> {
        self.entry_mut(id).map(|(_, entry)| entry)
    }

    /// The ports of the entry, unless it has given them up.
    pub fn ports(&self, id: Id) -> Option<Ports> {
        let slot = self.slots.get(usize::from(id.index))?;
        (slot.generation == id.generation)
            .then(|| slot.entry.as_ref()?.0)
            .flatten()
    }

    /// Makes the entry's ports free for another; the entry stays, and counts.
    pub fn release_ports(&mut self, id: Id) {
        let ports = self.entry_mut(id).and_then(|(ports, _)| ports.take());
        if let Some(ports) = ports {
            self.by_ports.remove(&ports);
        }
    }

    /// Removes the entry.
    pub fn remove(&mut self, id: Id) -> Option<T> {
        self.release_ports(id);
        let slot = self.slots.get_mut(usize::from(id.index))?;
        if slot.generation != id.generation {
            return None;
        }
        let (_, entry) = slot.entry.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        self.vacant.push(id.index);
        self.used = self.used.saturating_sub(1);
        Some(entry)
    }

    /// Gives the entry a turn after all that wait for theirs, unless it waits already.
    pub fn queue(&mut self, id: Id) {
        if self.entry_mut(id).is_none() {
            return;
        }
        if let Some(slot) = self.slots.get_mut(usize::from(id.index))
            && !slot.queued
        {
            slot.queued = true;
            self.turns.push_back(id.index);
        }
    }

    /// The entry whose turn it is; it waits no longer.
    pub fn next_turn(&mut self) -> Option<Id> {
        while let Some(index) = self.turns.pop_front() {
            let Some(slot) = self.slots.get_mut(usize::from(index)) else {
                continue;
            };
            slot.queued = false;
            if slot.entry.is_some() {
                return Some(Id {
                    index,
                    generation: slot.generation,
                });
            }
        }
        None
    }

    /// Whether somebody waits for a turn.
    pub fn has_turns(&self) -> bool {
        !self.turns.is_empty()
    }

    /// A host port that no stream to `guest` uses.
    pub fn assign_port(&mut self, guest: u32) -> u32 {
        // The range is larger than any table, so the loop ends.
        loop {
            self.last_port = match self.last_port {
                FIRST_ASSIGNED_PORT..LAST_ASSIGNED_PORT => self.last_port.wrapping_add(1),
                _ => FIRST_ASSIGNED_PORT,
            };
            let host = self.last_port;
            if !self.by_ports.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    /// Every entry's id.
    pub fn ids(&self) -> Vec<Id> {
        (0u16..=u16::MAX)
            .zip(&self.slots)
            .filter(|(_, slot)| slot.entry.is_some())
            .map(|(index, slot)| Id {
                index,
                generation: slot.generation,
            })
            .collect()
    }

    fn entry_mut(&mut self, id: Id) -> Option<&mut (Option<Ports>, T)> {
        let slot = self.slots.get_mut(usize::from(id.index))?;
        (slot.generation == id.generation)
            .then_some(slot.entry.as_mut())
            .flatten()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn ports(host: u32) -> Ports {
        Ports { host, guest: 1 }
    }

    #[test]
    fn turns_go_round() {
        let mut table = Table::new(8);
        let [a, b, c] = [1, 2, 3].map(|host| table.insert(ports(host), host).unwrap());
        for id in [a, b, a, c] {
            table.queue(id);
        }
        assert_eq!(table.next_turn(), Some(a));
        table.queue(a);
        assert_eq!(table.next_turn(), Some(b));
        assert_eq!(table.next_turn(), Some(c));
        assert_eq!(table.next_turn(), Some(a));
        assert_eq!(table.next_turn(), None);
    }

    #[test]
    fn a_removed_entrys_id_names_nothing() {
        let mut table = Table::new(1);
        let old = table.insert(ports(1), 'a').unwrap();
        table.queue(old);
        assert_eq!(table.insert(ports(2), 'b'), Err(Refused::Full));
        assert_eq!(table.insert(ports(1), 'b'), Err(Refused::Taken));
        assert_eq!(table.remove(old), Some('a'));
        let new = table.insert(ports(1), 'b').unwrap();
        assert_eq!(table.get_mut(old), None);
        assert_eq!(table.remove(old), None);
        assert_eq!(table.find(ports(1)), Some(new));
        assert_eq!(Id::from_bits(new.to_bits()), new);
    }

    #[test]
    fn an_entry_without_ports_still_counts() {
        let mut table = Table::new(1);
        let id = table.insert(ports(1), ()).unwrap();
        table.release_ports(id);
        assert_eq!(table.find(ports(1)), None);
        assert_eq!(table.insert(ports(1), ()), Err(Refused::Full));
        assert!(table.get_mut(id).is_some());
    }

    #[test]
    fn assigned_ports_wrap_and_skip_those_in_use() {
        let mut table = Table::new(8);
        assert_eq!(table.assign_port(7), 1 << 30);
        table
            .insert(
                Ports {
                    host: (1 << 30) + 1,
                    guest: 7,
                },
                (),
            )
            .unwrap();
        assert_eq!(table.assign_port(7), (1 << 30) + 2);
        table.last_port = LAST_ASSIGNED_PORT;
        assert_eq!(table.assign_port(7), 1 << 30);
        assert_eq!(table.assign_port(8), (1 << 30) + 1);
    }

    proptest! {
        #[test]
        fn behaves_like_a_map(steps in proptest::collection::vec((0u8..5, 0u32..6), 0..300)) {
            let mut table = Table::new(4);
            let mut model: HashMap<u32, Id> = HashMap::new();
            for (what, host) in steps {
                match what {
                    0 | 1 => match table.insert(ports(host), host) {
                        Ok(id) => { prop_assert!(model.len() < 4); prop_assert_eq!(model.insert(host, id), None); }
                        Err(Refused::Taken) => prop_assert!(model.contains_key(&host)),
                        Err(Refused::Full) => prop_assert_eq!(model.len(), 4),
                    },
                    2 => if let Some(id) = model.remove(&host) { prop_assert_eq!(table.remove(id), Some(host)); },
                    3 => if let Some(id) = model.get(&host) { table.queue(*id); },
                    _ => if let Some(id) = table.next_turn() { prop_assert!(model.values().any(|v| *v == id)); },
                }
                prop_assert_eq!(table.len(), model.len());
                prop_assert!(table.turns.len() <= 4);
                prop_assert_eq!(table.ids().len(), model.len());
                for (host, id) in &model {
                    prop_assert_eq!(table.find(ports(*host)), Some(*id));
                    prop_assert_eq!(table.get_mut(*id).copied(), Some(*host));
                    prop_assert_eq!(table.ports(*id), Some(ports(*host)));
                }
            }
        }
    }
}
