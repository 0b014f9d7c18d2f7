//! The registers of virtio-mmio version 2 (virtio 1.2, section 4.2.2) and the bits of Status (2.1).
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

/// Offset of QueueNotify: where KVM's ioeventfd listens.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Offset of InterruptACK, which the driver writes after every interrupt.
pub const INTERRUPT_ACK: u64 = 0x064;

/// A control register: 32 bits wide, and accessed only so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    MagicValue,
    Version,
    DeviceId,
    VendorId,
    DeviceFeatures,
    DeviceFeaturesSel,
    DriverFeatures,
    DriverFeaturesSel,
    QueueSel,
    QueueNumMax,
    QueueNum,
    QueueReady,
    QueueNotify,
    InterruptStatus,
    InterruptAck,
    Status,
    QueueDescLow,
    QueueDescHigh,
    QueueDriverLow,
    QueueDriverHigh,
    QueueDeviceLow,
    QueueDeviceHigh,
    /// SHMSel, SHMLen and SHMBase.
    SharedMemory,
    ConfigGeneration,
}

impl Register {
    /// The register at `offset`; none between registers and where none is defined.
    pub(super) fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x000 => Self::MagicValue,
            0x004 => Self::Version,
            0x008 => Self::DeviceId,
            0x00c => Self::VendorId,
            0x010 => Self::DeviceFeatures,
            0x014 => Self::DeviceFeaturesSel,
            0x020 => Self::DriverFeatures,
            0x024 => Self::DriverFeaturesSel,
            0x030 => Self::QueueSel,
            0x034 => Self::QueueNumMax,
            0x038 => Self::QueueNum,
            0x044 => Self::QueueReady,
            QUEUE_NOTIFY => Self::QueueNotify,
            0x060 => Self::InterruptStatus,
            INTERRUPT_ACK => Self::InterruptAck,
            0x070 => Self::Status,
            0x080 => Self::QueueDescLow,
            0x084 => Self::QueueDescHigh,
            0x090 => Self::QueueDriverLow,
            0x094 => Self::QueueDriverHigh,
            0x0a0 => Self::QueueDeviceLow,
            0x0a4 => Self::QueueDeviceHigh,
            0x0ac | 0x0b0 | 0x0b4 | 0x0b8 | 0x0bc => Self::SharedMemory,
            0x0fc => Self::ConfigGeneration,
            _ => return None,
        })
    }
}

/// Bits of the Status register, and the states that the handshake goes through.
pub(super) mod status {
    /// After reset.
    pub(in super::super) const NONE: u32 = 0;
    /// The guest has seen the device.
    pub(in super::super) const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub(in super::super) const DRIVER: u32 = 2;
    /// The driver is ready.
    pub(in super::super) const DRIVER_OK: u32 = 4;
    /// Features are agreed on.
    pub(in super::super) const FEATURES_OK: u32 = 8;
    /// The device gave up; set by the device alone.
    pub(in super::super) const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub(in super::super) const FAILED: u32 = 128;

    /// State: seen.
    pub(in super::super) const ACKNOWLEDGED: u32 = ACKNOWLEDGE;
    /// State: features are being negotiated.
    pub(in super::super) const DRIVING: u32 = ACKNOWLEDGED | DRIVER;
    /// State: queues are being set up.
    pub(in super::super) const NEGOTIATED: u32 = DRIVING | FEATURES_OK;
}
