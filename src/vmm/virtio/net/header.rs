//! `struct virtio_net_hdr` (virtio 1.2, section 5.1.6), as the driver sends it: parsed once, by copy, checked
//! against the frame and the negotiated features, and written anew for the host's kernel.
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

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_HOST_UFO, VIRTIO_NET_F_HOST_USO, VIRTIO_NET_HDR_F_NEEDS_CSUM,
    VIRTIO_NET_HDR_GSO_ECN, VIRTIO_NET_HDR_GSO_NONE, VIRTIO_NET_HDR_GSO_TCPV4,
    VIRTIO_NET_HDR_GSO_TCPV6, VIRTIO_NET_HDR_GSO_UDP, VIRTIO_NET_HDR_GSO_UDP_L4,
};

/// Bytes of the header under VERSION_1, `num_buffers` included.
pub const HEADER_LEN: usize = 12;

/// Bytes of an Ethernet header.
pub const ETHERNET_HEADER: usize = 14;

/// A VLAN tag.
pub const VLAN_TAG: usize = 4;

/// Bytes that a checksum takes.
const CHECKSUM: u32 = 2;

/// What the driver's header asks of the host, nothing else in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransmitHeader {
    checksum: Option<Checksum>,
    segmentation: Option<Segmentation>,
}

/// The host completes a checksum.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Checksum {
    /// From where on the frame is summed.
    start: u16,
    /// Where the sum goes, from `start`.
    offset: u16,
}

/// The host cuts the frame into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segmentation {
    /// `gso_type`, the ECN bit included.
    kind: u8,
    /// Bytes of headers in front of the first segment's payload: a hint.
    header_len: u16,
    /// Payload of each segment, at least 1.
    size: u16,
}

/// The header does not fit the frame, or asks for what was not negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Malformed;

impl TransmitHeader {
    /// Reads the header in front of a frame of `frame_len` bytes.
    ///
    /// # Errors
    /// [`Malformed`] when it breaks the driver's requirements of section 5.1.6.2.1.
    pub fn parse(
        bytes: &[u8; HEADER_LEN],
        frame_len: u32,
        features: u64,
    ) -> Result<Self, Malformed> {
        let [flags, kind, hl0, hl1, gs0, gs1, cs0, cs1, co0, co1, _, _] = *bytes;
        let has = |bit: u32| features & (1 << bit) != 0;
        // Bits that the driver must not set are for the device to ignore.
        let checksum = if u32::from(flags) & VIRTIO_NET_HDR_F_NEEDS_CSUM == 0 {
            None
        } else {
            let checksum = Checksum {
                start: u16::from_le_bytes([cs0, cs1]),
                offset: u16::from_le_bytes([co0, co1]),
            };
            let end = u32::from(checksum.start)
                .saturating_add(checksum.offset.into())
                .saturating_add(CHECKSUM);
            if !has(VIRTIO_NET_F_CSUM) || end > frame_len {
                return Err(Malformed);
            }
            Some(checksum)
        };
        let ecn = u32::from(kind) & VIRTIO_NET_HDR_GSO_ECN != 0;
        let needed = match u32::from(kind) & !VIRTIO_NET_HDR_GSO_ECN {
            VIRTIO_NET_HDR_GSO_NONE if !ecn => {
                return Ok(Self {
                    checksum,
                    segmentation: None,
                });
            }
            VIRTIO_NET_HDR_GSO_TCPV4 => VIRTIO_NET_F_HOST_TSO4,
            VIRTIO_NET_HDR_GSO_TCPV6 => VIRTIO_NET_F_HOST_TSO6,
            VIRTIO_NET_HDR_GSO_UDP if !ecn => VIRTIO_NET_F_HOST_UFO,
            VIRTIO_NET_HDR_GSO_UDP_L4 if !ecn => VIRTIO_NET_F_HOST_USO,
            _ => return Err(Malformed),
        };
        let segmentation = Segmentation {
            kind,
            header_len: u16::from_le_bytes([hl0, hl1]),
            size: u16::from_le_bytes([gs0, gs1]),
        };
        let allowed = has(needed) && (!ecn || has(VIRTIO_NET_F_HOST_ECN));
        let fits = segmentation.size > 0 && u32::from(segmentation.header_len) <= frame_len;
        if !allowed || !fits || checksum.is_none() {
            return Err(Malformed);
        }
        Ok(Self {
            checksum,
            segmentation: Some(segmentation),
        })
    }

    /// The header for the host's kernel.
    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let [flags, kind, hl0, hl1, gs0, gs1, cs0, cs1, co0, co1, _, _] = &mut bytes;
        if let Some(checksum) = self.checksum {
            *flags = VIRTIO_NET_HDR_F_NEEDS_CSUM.to_le_bytes()[0];
            [*cs0, *cs1] = checksum.start.to_le_bytes();
            [*co0, *co1] = checksum.offset.to_le_bytes();
        }
        if let Some(segmentation) = self.segmentation {
            *kind = segmentation.kind;
            [*hl0, *hl1] = segmentation.header_len.to_le_bytes();
            [*gs0, *gs1] = segmentation.size.to_le_bytes();
        }
        bytes
    }

    /// Whether the frame may be longer than the MTU, because the host segments it.
    pub fn is_segmented(&self) -> bool {
        self.segmentation.is_some()
    }

    /// Frames that a frame of `frame_len` bytes becomes on the wire, about: headers count as payload.
    pub fn frames(&self, frame_len: u32) -> u32 {
        let size = self.segmentation.map_or(0, |s| s.size);
        frame_len.checked_div(size.into()).unwrap_or(1).max(1)
    }
}

/// Segments of a received frame of `frame_len` bytes, about, from its header as the host's kernel wrote it.
pub fn received_frames(header: &[u8; HEADER_LEN], frame_len: u32) -> u32 {
    let [_, kind, _, _, gs0, gs1, ..] = *header;
    let size = match u32::from(kind) {
        VIRTIO_NET_HDR_GSO_NONE => 0,
        _ => u16::from_le_bytes([gs0, gs1]),
    };
    frame_len.checked_div(size.into()).unwrap_or(1).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = u64::MAX;

    fn parse(
        bytes: [u8; HEADER_LEN],
        len: u32,
        features: u64,
    ) -> Result<TransmitHeader, Malformed> {
        TransmitHeader::parse(&bytes, len, features)
    }

    #[test]
    fn a_checksum_lies_inside_the_frame() {
        let header = [1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0];
        assert!(parse(header, 52, ALL).is_ok());
        assert_eq!(parse(header, 51, ALL), Err(Malformed));
        assert_eq!(parse(header, 52, ALL & !1), Err(Malformed));
        let far = [1, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0];
        assert_eq!(parse(far, 65_553, ALL), Err(Malformed));
    }

    #[test]
    fn segmentation_is_what_was_negotiated() {
        let features = [
            (1, VIRTIO_NET_F_HOST_TSO4),
            (3, VIRTIO_NET_F_HOST_UFO),
            (4, VIRTIO_NET_F_HOST_TSO6),
            (5, VIRTIO_NET_F_HOST_USO),
        ];
        for (kind, feature) in features {
            let header = [1, kind, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
            assert_eq!(parse(header, 4000, ALL).unwrap().frames(4000), 2);
            assert_eq!(parse(header, 4000, ALL & !(1 << feature)), Err(Malformed));
            let without_checksum = [0, kind, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
            assert_eq!(parse(without_checksum, 4000, ALL), Err(Malformed));
            let without_size = [1, kind, 54, 0, 0, 0, 34, 0, 16, 0, 0, 0];
            assert_eq!(parse(without_size, 4000, ALL), Err(Malformed));
            let headers_beyond_the_end = [1, kind, 1, 16, 0xb4, 5, 34, 0, 16, 0, 0, 0];
            assert_eq!(parse(headers_beyond_the_end, 4096, ALL), Err(Malformed));
        }
        for kind in [2, 6, 0x80, 0x83, 0x85, 0x7f, 0xff] {
            let header = [1, kind, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
            assert_eq!(parse(header, 4000, ALL), Err(Malformed), "{kind:#x}");
        }
        let ecn = [1, 0x81, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0];
        assert_eq!(parse(ecn, 4000, ALL).unwrap().to_bytes(), ecn);
        assert_eq!(
            parse(ecn, 4000, ALL & !(1 << VIRTIO_NET_F_HOST_ECN)),
            Err(Malformed)
        );
    }

    proptest! {
        /// What is let through says the same again, and nothing that was not asked for.
        #[test]
        fn the_host_gets_only_what_was_checked(bytes: [u8; HEADER_LEN], len in 0..70_000u32, features: u64) {
            if let Ok(header) = parse(bytes, len, features) {
                let out = header.to_bytes();
                prop_assert_eq!(parse(out, len, features), Ok(header));
                prop_assert_eq!(out[0] & !1, 0);
                prop_assert_eq!(&out[10..], [0, 0]);
                prop_assert!(out[0] != 0 || out[6..10] == [0; 4]);
                prop_assert!(out[1] != 0 || out[2..6] == [0; 4]);
                prop_assert!((1..=len.max(1)).contains(&header.frames(len)));
            }
        }
    }
}
