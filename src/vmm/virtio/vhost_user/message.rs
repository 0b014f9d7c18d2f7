//! Messages of the vhost-user protocol (QEMU's `docs/interop/vhost-user.rst`), of which a frontend needs few:
//! made and parsed here, never sent.
//!
//! A message is a header of three little-endian words (request, flags, bytes of payload) and its payload. Words
//! of the payload are native in the protocol's text, which on x86-64 is the same.
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

/// Bytes of a header.
pub const HEADER_LEN: usize = 12;

/// The header's flags: version 1 in the lowest two bits.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// The message is an answer.
const REPLY: u32 = 1 << 2;
/// The sender wants to hear whether the request was carried out.
const NEED_REPLY: u32 = 1 << 3;

/// Virtio feature bit 30: the backend speaks of protocol features. It is not the driver's.
pub const F_PROTOCOL_FEATURES: u64 = 1 << 30;
/// Protocol feature: more queues than the device needs at least, and a way to ask how many.
pub const P_MQ: u64 = 1 << 0;
/// Protocol feature: requests without an answer are answered when asked to.
pub const P_REPLY_ACK: u64 = 1 << 3;

/// Where guest memory begins in the addresses that this process claims to have it at. The backend translates
/// them back by the table of memory regions, so any will do: the true ones are nobody else's to know. Not 0,
/// which some take for none.
const ADDRESS_BASE: u64 = 1 << 40;

/// What a frontend asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Request {
    /// The virtio features that the backend has.
    GetFeatures = 1,
    /// Those that the driver agreed to.
    SetFeatures = 2,
    /// A session begins.
    SetOwner = 3,
    /// Guest memory, with its files.
    SetMemTable = 5,
    /// Entries of a ring.
    SetVringNum = 8,
    /// Where a ring lies.
    SetVringAddr = 9,
    /// The next entry of its available ring.
    SetVringBase = 10,
    /// Stop a ring, and say that entry.
    GetVringBase = 11,
    /// The eventfd of the driver's notifications.
    SetVringKick = 12,
    /// The eventfd of the device's.
    SetVringCall = 13,
    /// The protocol features that the backend has.
    GetProtocolFeatures = 15,
    /// Those that will be used.
    SetProtocolFeatures = 16,
    /// The most queues.
    GetQueueNum = 17,
    /// Begin to serve a ring, or pause.
    SetVringEnable = 18,
}

impl Request {
    /// As the protocol calls it, without `VHOST_USER_`.
    pub fn name(self) -> &'static str {
        match self {
            Self::GetFeatures => "GET_FEATURES",
            Self::SetFeatures => "SET_FEATURES",
            Self::SetOwner => "SET_OWNER",
            Self::SetMemTable => "SET_MEM_TABLE",
            Self::SetVringNum => "SET_VRING_NUM",
            Self::SetVringAddr => "SET_VRING_ADDR",
            Self::SetVringBase => "SET_VRING_BASE",
            Self::GetVringBase => "GET_VRING_BASE",
            Self::SetVringKick => "SET_VRING_KICK",
            Self::SetVringCall => "SET_VRING_CALL",
            Self::GetProtocolFeatures => "GET_PROTOCOL_FEATURES",
            Self::SetProtocolFeatures => "SET_PROTOCOL_FEATURES",
            Self::GetQueueNum => "GET_QUEUE_NUM",
            Self::SetVringEnable => "SET_VRING_ENABLE",
        }
    }

    /// The whole message. `acknowledged`: it is to be answered, though its kind is not.
    pub fn message(self, payload: &[u8], acknowledged: bool) -> Vec<u8> {
        let flags = if acknowledged { NEED_REPLY } else { 0 };
        let len = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut message = words(&[self as u32, VERSION | flags, len]);
        message.extend(payload);
        message
    }

    /// Whether `header` is that of an answer to this request with `len` bytes of payload.
    pub fn is_answered_by(self, header: [u8; HEADER_LEN], len: usize) -> bool {
        let mut words = header.chunks_exact(4).map(|word| {
            let bytes = word.first_chunk().copied().unwrap_or_default();
            u32::from_le_bytes(bytes)
        });
        let mut next = || words.next().unwrap_or_default();
        let (request, flags, size) = (next(), next(), next());
        request == self as u32
            && flags & VERSION_MASK == VERSION
            && flags & REPLY != 0
            && usize::try_from(size) == Ok(len)
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Two words: the index of a ring, and a value for it.
pub fn vring_state(index: u16, value: u32) -> [u8; 8] {
    let [a, b, c, d] = u32::from(index).to_le_bytes();
    let [e, f, g, h] = value.to_le_bytes();
    [a, b, c, d, e, f, g, h]
}

/// Of a [`vring_state`] the value; none: it is about another ring.
pub fn vring_value(index: u16, state: [u8; 8]) -> Option<u32> {
    let [a, b, c, d, e, f, g, h] = state;
    let same = u32::from_le_bytes([a, b, c, d]) == u32::from(index);
    same.then_some(u32::from_le_bytes([e, f, g, h]))
}

/// Where a ring's parts lie, in guest-physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VringAddress {
    /// The descriptor table.
    pub descriptors: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub available: u64,
}

/// The payload of [`Request::SetVringAddr`]: index, flags, descriptor table, used ring, available ring, log.
pub fn vring_address(index: u16, ring: VringAddress) -> Vec<u8> {
    let mut payload = words(&[index.into(), 0]);
    for address in [ring.descriptors, ring.used, ring.available] {
        payload.extend(claimed(address).to_le_bytes());
    }
    payload.extend(0_u64.to_le_bytes());
    payload
}

/// A stretch of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Its guest-physical address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// The payload of [`Request::SetMemTable`]: number, padding; of each region guest address, size, this process's
/// address, offset in its file.
pub fn memory_table(regions: &[Region]) -> Vec<u8> {
    let mut payload = words(&[u32::try_from(regions.len()).unwrap_or(u32::MAX), 0]);
    for region in regions {
        for word in [
            region.start,
            region.len,
            claimed(region.start),
            region.offset,
        ] {
            payload.extend(word.to_le_bytes());
        }
    }
    payload
}

fn claimed(address: u64) -> u64 {
    address.wrapping_add(ADDRESS_BASE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_what_the_protocol_says() {
        let state = vring_state(1, 256);
        let message = Request::SetVringNum.message(&state, true);
        assert_eq!(
            message,
            [8, 0, 0, 0, 9, 0, 0, 0, 8, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0]
        );
        assert_eq!(
            Request::SetOwner.message(&[], false),
            [3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
        );
    }

    #[test]
    fn an_answer_is_to_the_question() {
        let header = |words: [u32; 3]| -> [u8; HEADER_LEN] {
            super::words(&words).as_slice().try_into().unwrap()
        };
        let answered = |words| Request::GetFeatures.is_answered_by(header(words), 8);
        assert!(answered([1, 5, 8]));
        for wrong in [[2, 5, 8], [1, 1, 8], [1, 6, 8], [1, 5, 9], [1, 5, 0]] {
            assert!(!answered(wrong), "{wrong:?}");
        }
    }

    #[test]
    fn rings_lie_in_the_memory_of_the_table() {
        let table = memory_table(&[Region {
            start: 0,
            len: 4096,
            offset: 8192,
        }]);
        let word =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((table.len(), word(&table, 0)), (40, 1));
        assert_eq!(
            (word(&table, 8), word(&table, 16), word(&table, 32)),
            (0, 4096, 8192)
        );
        let ring = VringAddress {
            descriptors: 16,
            used: 32,
            available: 48,
        };
        let address = vring_address(3, ring);
        assert_eq!((address.len(), word(&address, 0)), (40, 3));
        let base = word(&table, 24);
        let parts = [8, 16, 24].map(|at| word(&address, at) - base);
        assert_eq!((parts, word(&address, 32)), ([16, 32, 48], 0));
    }

    #[test]
    fn a_value_is_of_the_ring_that_was_asked_about() {
        assert_eq!(vring_value(2, vring_state(2, 77)), Some(77));
        assert_eq!(vring_value(1, vring_state(2, 77)), None);
    }
}
