//! A device on a pair of sockets: what stands for a tap, and the guest's side of it.
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};

use cube::vmm::spec::RateLimit;
use cube::vmm::virtio::net::tap::{Link, Offloads};
use cube::vmm::virtio::net::{Identity, Net, NetControl};
use cube::vmm::virtio::{Activation, Active, HostError, Interest, Turn, VirtioDevice};
use cube_guest::network::MacAddress;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};

use crate::driver::{Buffer, Driver, DriverQueue};

/// The guest's address.
pub const GUEST: MacAddress = MacAddress([2, 0, 0, 0, 0, 1]);
/// Somebody else's.
pub const OTHER: MacAddress = MacAddress([2, 0, 0, 0, 0, 2]);
/// Bytes of the virtio header.
pub const HEADER: usize = 12;
/// A header that asks for nothing.
pub const PLAIN: [u8; HEADER] = [0; HEADER];
/// Entries of the queues in tests.
pub const SIZE: u16 = 64;

pub mod feature {
    pub const CSUM: u64 = 1;
    pub const MRG_RXBUF: u64 = 1 << 15;
    pub const MQ: u64 = 1 << 22;
    /// What lets the host hand over frames that are longer than the MTU.
    pub const SEGMENTED: u64 = 1 << 7 | 1 << 8 | 1 << 10 | 1 << 54 | 1 << 55;
}

/// What the device did to its link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkState {
    pub offloads: Offloads,
    pub used: usize,
}

struct SocketLink {
    queues: Vec<OwnedFd>,
    state: Arc<Mutex<LinkState>>,
}

impl Link for SocketLink {
    fn queues(&self) -> &[OwnedFd] {
        &self.queues
    }

    fn offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.state.lock().unwrap().offloads = offloads;
        Ok(())
    }

    fn use_queues(&mut self, count: usize) -> io::Result<()> {
        self.state.lock().unwrap().used = count;
        Ok(())
    }
}

/// A device that nobody tells of frames on its link.
struct Deaf(Net<SocketLink>);

impl VirtioDevice for Deaf {
    fn device_type(&self) -> u32 {
        self.0.device_type()
    }

    fn name(&self) -> String {
        self.0.name()
    }

    fn features(&self) -> u64 {
        self.0.features()
    }

    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<Box<dyn Active>, HostError> {
        let kick = activation.kick.as_raw_fd();
        let inner = self.0.activate(activation)?;
        Ok(Box::new(Kicked { inner, kick }))
    }

    fn reset(&mut self, _stopped: Box<dyn Active>) {
        unreachable!("no test resets it");
    }
}

/// A worker half that is told of kicks and nothing else.
struct Kicked {
    inner: Box<dyn Active>,
    kick: RawFd,
}

impl Active for Kicked {
    fn interests(&self) -> Vec<Interest> {
        let mut interests = self.inner.interests();
        interests.retain(|interest| interest.fd == self.kick);
        interests
    }

    fn ready(&mut self, token: u32) -> Result<Turn, HostError> {
        self.inner.ready(token)
    }
}

/// What a test wants other than the usual.
pub struct Options {
    /// Nobody tells the device of frames on its link.
    pub deaf: bool,
    pub pairs: usize,
    pub mtu: u16,
    pub check_source: bool,
    pub limits: (RateLimit, RateLimit),
    /// Features that the driver does without.
    pub without: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deaf: false,
            pairs: 1,
            mtu: 1500,
            check_source: false,
            limits: Default::default(),
            without: 0,
        }
    }
}

/// A driver on a device, and the other end of its link.
pub struct Guest {
    pub driver: Driver,
    pub queues: Vec<DriverQueue>,
    pub host: Vec<OwnedFd>,
    pub control: NetControl,
    pub link: Arc<Mutex<LinkState>>,
    without: u64,
}

/// A device with everything negotiated.
pub fn guest() -> Guest {
    guest_with(Options::default())
}

pub fn guest_with(options: Options) -> Guest {
    let state = Arc::new(Mutex::new(LinkState {
        offloads: Offloads::NONE,
        used: options.pairs,
    }));
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let pair = || socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    let (queues, host) = (0..options.pairs).map(|_| pair()).unzip();
    let link = SocketLink {
        queues,
        state: state.clone(),
    };
    let identity = Identity {
        name: "eth0".into(),
        mac: GUEST,
        mtu: options.mtu,
        check_source: options.check_source,
    };
    let net = Net::new(identity, link, options.limits).unwrap();
    let control = net.control();
    let mut guest = Guest {
        driver: Driver::new(if options.deaf {
            Box::new(Deaf(net))
        } else {
            Box::new(net)
        }),
        queues: Vec::new(),
        host,
        control,
        link: state,
        without: options.without,
    };
    guest.start(options.pairs);
    guest
}

impl Guest {
    /// From reset to DRIVER_OK.
    pub fn start(&mut self, pairs: usize) {
        let features = self.driver.offered_features() & !self.without;
        let pairs = if features & feature::MQ == 0 {
            1
        } else {
            pairs
        };
        self.queues = self.driver.start_with(features, &vec![SIZE; 2 * pairs + 1]);
    }

    /// Resets the device and starts it again.
    pub fn start_again(&mut self) {
        self.driver.reset();
        self.start(self.host.len());
    }

    /// Offers a frame with its header; returns the chain's head.
    pub fn offer(&mut self, header: [u8; HEADER], frame: &[u8]) -> u16 {
        let bytes = [&header, frame].concat();
        let at = self.driver.alloc_with(&bytes);
        let head = self.queues[1].add(&[Buffer::read(at, bytes.len() as u32)]);
        self.driver.kick(1);
        head
    }

    /// Sends a frame; returns when the device is done with it.
    pub fn send(&mut self, header: [u8; HEADER], frame: &[u8]) {
        let head = self.offer(header, frame);
        assert_eq!(self.driver.wait_used(&mut self.queues[1]), (head, 0));
    }

    /// What the host sees next, header and frame; none: nothing.
    pub fn seen_by_host(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 70_000];
        let len = rustix::io::read(&self.host[0], &mut bytes).ok()?;
        bytes.truncate(len);
        Some(bytes)
    }

    /// The host sends a frame.
    pub fn arrive(&self, header: [u8; HEADER], frame: &[u8]) {
        let bytes = [&header, frame].concat();
        let sent = rustix::net::send(&self.host[0], &bytes, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    /// Offers a buffer of that many bytes; returns its head and address.
    pub fn buffer(&mut self, len: u32) -> (u16, u64) {
        let at = self.driver.alloc(len);
        self.driver.memory_fill(at, len, 0xee);
        (self.queues[0].add(&[Buffer::write(at, len)]), at)
    }

    /// Offers as many buffers, and kicks; returns their heads and addresses.
    pub fn buffers(&mut self, count: usize, len: u32) -> Vec<(u16, u64)> {
        let buffers = (0..count).map(|_| self.buffer(len)).collect();
        self.driver.kick(0);
        buffers
    }

    /// Waits for the next used buffer.
    pub fn received(&mut self) -> (u16, u32) {
        self.driver.wait_used(&mut self.queues[0])
    }

    /// A control command; its answer.
    pub fn command(&mut self, bytes: &[u8]) -> u8 {
        let index = self.queues.len() - 1;
        let command = self.driver.alloc_with(bytes);
        let answer = self.driver.alloc(1);
        self.driver.memory_fill(answer, 1, 0xee);
        let buffers = [
            Buffer::read(command, bytes.len() as u32),
            Buffer::write(answer, 1),
        ];
        let queue = &mut self.queues[index];
        assert_eq!(self.driver.call(index as u32, queue, &buffers), 1);
        self.driver.bytes(answer, 1)[0]
    }

    /// A frame goes out and one comes in.
    pub fn still_works(&mut self) {
        while self.seen_by_host().is_some() {}
        let frame = frame(GUEST, OTHER, 60);
        self.send(PLAIN, &frame);
        assert_eq!(self.seen_by_host(), Some([&PLAIN[..], &frame].concat()));
        let frame = self::frame(OTHER, GUEST, 60);
        self.buffers(50, 1526);
        self.arrive(PLAIN, &frame);
        let (_, written) = self.received();
        assert_eq!(written, 72);
    }
}

/// A frame of that many bytes, with a pattern in it.
pub fn frame(from: MacAddress, to: MacAddress, len: usize) -> Vec<u8> {
    let pattern = (0..len - 14).map(|at| (at * 7 % 251) as u8);
    [&to.0[..], &from.0, &[0x88, 0xb5]]
        .concat()
        .into_iter()
        .chain(pattern)
        .collect()
}
