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

/// What the transport sets, beside those that [`crate::vmm::virtio::Interrupt`] does.
pub(super) const MAGIC_VALUE: u64 = 0x000;
pub(super) const VERSION: u64 = 0x004;
pub(super) const DEVICE_ID: u64 = 0x008;
pub(super) const VENDOR_ID: u64 = 0x00c;
pub(super) const DEVICE_FEATURES: u64 = 0x010;
pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
pub(super) const QUEUE_READY: u64 = 0x044;
pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
/// Where the device's config space begins.
pub(super) const CONFIG: u64 = 0x100;
/// SHMLenLow, SHMLenHigh, SHMBaseLow and SHMBaseHigh.
pub(super) const SHARED_MEMORY: [u64; 4] = [0x0b0, 0x0b4, 0x0b8, 0x0bc];
/// Offset of InterruptStatus.
pub(in crate::vmm::virtio) const INTERRUPT_STATUS: u64 = 0x060;
/// Offset of Status.
pub(in crate::vmm::virtio) const STATUS: u64 = 0x070;
/// Offset of QueueNotify: where KVM's ioeventfd listens.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Offset of InterruptACK, which the driver writes after every interrupt.
pub const INTERRUPT_ACK: u64 = 0x064;

/// A register that the driver may write: 32 bits wide, and written only so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    DeviceFeaturesSel,
    DriverFeatures,
    DriverFeaturesSel,
    QueueSel,
    QueueNum,
    QueueReady,
    QueueNotify,
    InterruptAck,
    Status,
    QueueDescLow,
    QueueDescHigh,
    QueueDriverLow,
    QueueDriverHigh,
    QueueDeviceLow,
    QueueDeviceHigh,
    SharedMemorySel,
}

impl Register {
    /// The register at `offset`; none between registers and where none can be written.
    pub(super) fn at(offset: u64) -> Option<Self> {
        Some(match offset {
            0x014 => Self::DeviceFeaturesSel,
            0x020 => Self::DriverFeatures,
            0x024 => Self::DriverFeaturesSel,
            0x030 => Self::QueueSel,
            0x038 => Self::QueueNum,
            QUEUE_READY => Self::QueueReady,
            QUEUE_NOTIFY => Self::QueueNotify,
            INTERRUPT_ACK => Self::InterruptAck,
            STATUS => Self::Status,
            0x080 => Self::QueueDescLow,
            0x084 => Self::QueueDescHigh,
            0x090 => Self::QueueDriverLow,
            0x094 => Self::QueueDriverHigh,
            0x0a0 => Self::QueueDeviceLow,
            0x0a4 => Self::QueueDeviceHigh,
            0x0ac => Self::SharedMemorySel,
            _ => return None,
        })
    }
}

/// Bits of the Status register, and the states that the handshake goes through.
pub(in crate::vmm::virtio) mod status {
    /// After reset.
    pub(in crate::vmm::virtio) const NONE: u32 = 0;
    /// The guest has seen the device.
    pub(in crate::vmm::virtio) const ACKNOWLEDGE: u32 = 1;
    /// The guest has a driver for it.
    pub(in crate::vmm::virtio) const DRIVER: u32 = 2;
    /// The driver is ready.
    pub(in crate::vmm::virtio) const DRIVER_OK: u32 = 4;
    /// Features are agreed on.
    pub(in crate::vmm::virtio) const FEATURES_OK: u32 = 8;
    /// The device gave up; set by the device alone.
    pub(in crate::vmm::virtio) const NEEDS_RESET: u32 = 64;
    /// The driver gave up.
    pub(in crate::vmm::virtio) const FAILED: u32 = 128;

    /// State: seen.
    pub(in crate::vmm::virtio) const ACKNOWLEDGED: u32 = ACKNOWLEDGE;
    /// State: features are being negotiated.
    pub(in crate::vmm::virtio) const DRIVING: u32 = ACKNOWLEDGED | DRIVER;
    /// State: queues are being set up.
    pub(in crate::vmm::virtio) const NEGOTIATED: u32 = DRIVING | FEATURES_OK;
}
