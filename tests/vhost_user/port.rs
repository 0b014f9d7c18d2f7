//! A port of a switch: a vhost-user-net backend, for as long as one connection lasts.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "each test binary includes this as a module and uses a part of it"
)]

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vhost::vhost_user::{Listener, VhostUserProtocolFeatures};
use vhost_user_backend::{ShutdownHandle, VhostUserBackend, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

pub type Memory = GuestMemoryAtomic<GuestMemoryMmap>;
type Vring = VringRwLock<Memory>;

pub const F_CSUM: u64 = 1;
pub const F_MRG_RXBUF: u64 = 1 << 15;
pub const F_MQ: u64 = 1 << 22;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
/// What a port has if nothing else is said.
pub const FEATURES: u64 = F_VERSION_1 | F_MRG_RXBUF | F_INDIRECT | F_PROTOCOL;

/// What becomes of a frame of the guest (with its virtio header), and of the pair that it came by.
type OnFrame = dyn Fn(&Port, usize, Vec<u8>) + Send + Sync;

/// The device, and the other side's handle to it.
#[derive(Clone)]
pub struct Port(Arc<Inner>);

struct Inner {
    pairs: usize,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    memory: Mutex<Option<Memory>>,
    vrings: Mutex<Vec<Vring>>,
    /// Frames for the guest, by pair.
    waiting: Mutex<Vec<VecDeque<Vec<u8>>>>,
    on_frame: Box<OnFrame>,
    acked: Mutex<u64>,
}

impl Port {
    pub fn new(
        pairs: usize,
        features: u64,
        on_frame: impl Fn(&Self, usize, Vec<u8>) + Send + Sync + 'static,
    ) -> Self {
        let protocol = VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::REPLY_ACK;
        Self(Arc::new(Inner {
            pairs,
            features,
            protocol,
            memory: Mutex::default(),
            vrings: Mutex::default(),
            waiting: Mutex::new(vec![VecDeque::new(); pairs]),
            on_frame: Box::new(on_frame),
            acked: Mutex::default(),
        }))
    }

    /// A port that sends every frame back by the pair that it came by.
    pub fn echo(pairs: usize, features: u64) -> Self {
        Self::new(pairs, features, |port, pair, frame| port.send(pair, frame))
    }

    /// Features that the driver agreed to.
    pub fn acked(&self) -> u64 {
        *self.0.acked.lock().unwrap()
    }

    /// Gives the guest a frame, now or when it has a buffer.
    pub fn send(&self, pair: usize, frame: Vec<u8>) {
        self.0.waiting.lock().unwrap()[pair].push_back(frame);
        self.deliver(pair);
    }

    fn deliver(&self, pair: usize) {
        let vrings = self.0.vrings.lock().unwrap();
        let memory = self.0.memory.lock().unwrap();
        let (Some(vring), Some(memory)) = (vrings.get(2 * pair), memory.as_ref()) else {
            return;
        };
        let memory = memory.memory();
        let mut used = false;
        let mut waiting = self.0.waiting.lock().unwrap();
        while let Some(mut frame) = waiting[pair].pop_front() {
            let mut state = vring.get_mut();
            let Some(chain) = state.get_queue_mut().pop_descriptor_chain(&*memory) else {
                waiting[pair].push_front(frame);
                break;
            };
            // num_buffers
            frame[10..12].copy_from_slice(&1_u16.to_le_bytes());
            let head = chain.head_index();
            let mut writer = chain.writer(&*memory).unwrap();
            writer.write_all(&frame).unwrap();
            drop(state);
            vring.add_used(head, frame.len() as u32).unwrap();
            used = true;
        }
        if used {
            vring.signal_used_queue().unwrap();
        }
    }

    fn take(&self, pair: usize) {
        let mut frames = Vec::new();
        {
            let vrings = self.0.vrings.lock().unwrap();
            let memory = self.0.memory.lock().unwrap();
            let (vring, memory) = (&vrings[2 * pair + 1], memory.as_ref().unwrap().memory());
            loop {
                let mut state = vring.get_mut();
                let Some(chain) = state.get_queue_mut().pop_descriptor_chain(&*memory) else {
                    break;
                };
                let head = chain.head_index();
                let mut frame = Vec::new();
                chain
                    .reader(&*memory)
                    .unwrap()
                    .read_to_end(&mut frame)
                    .unwrap();
                drop(state);
                vring.add_used(head, 0).unwrap();
                frames.push(frame);
            }
            vring.signal_used_queue().unwrap();
        }
        for frame in frames {
            (self.0.on_frame)(self, pair, frame);
        }
    }
}

impl VhostUserBackend for Port {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        2 * self.0.pairs
    }

    fn max_queue_size(&self) -> usize {
        256
    }

    fn features(&self) -> u64 {
        self.0.features
    }

    fn acked_features(&self, features: u64) {
        *self.0.acked.lock().unwrap() = features;
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.0.protocol
    }

    fn set_event_idx(&self, _enabled: bool) {}

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        *self.0.memory.lock().unwrap() = Some(memory);
        Ok(())
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::empty()).ok()
    }

    fn stop_vring(&self, _queue: u32) -> io::Result<()> {
        // Nothing is delivered to it until the driver kicks again.
        self.0.vrings.lock().unwrap().clear();
        Ok(())
    }

    fn handle_event(&self, queue: u16, _: EventSet, vrings: &[Vring], _: usize) -> io::Result<()> {
        *self.0.vrings.lock().unwrap() = vrings.to_vec();
        let pair = usize::from(queue) / 2;
        match queue % 2 {
            0 => self.deliver(pair),
            _ => self.take(pair),
        }
        Ok(())
    }
}

/// A port that listens, until it is dropped: then connection and socket are gone.
pub struct Plugged {
    connected: Arc<Mutex<Connected>>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Connected {
    pulled: bool,
    shutdown: Option<ShutdownHandle>,
}

impl Plugged {
    /// Serves the first that connects to `socket`; it can be connected to when this returns.
    pub fn new(socket: &Path, port: Port) -> Self {
        let mut listener = Listener::new(socket, true).unwrap();
        let connected = Arc::new(Mutex::new(Connected::default()));
        let seen = connected.clone();
        let thread = std::thread::spawn(move || {
            let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
            let mut daemon = VhostUserDaemon::new("port".into(), port, memory).unwrap();
            daemon.start(&mut listener).unwrap();
            drop(listener);
            {
                let mut seen = seen.lock().unwrap();
                seen.shutdown = daemon.shutdown_handle();
                if seen.pulled {
                    daemon.request_shutdown();
                }
            }
            // However the frontend went away.
            let _ = daemon.wait();
        });
        Self {
            connected,
            thread: Some(thread),
        }
    }
}

impl Drop for Plugged {
    fn drop(&mut self) {
        {
            let mut connected = self.connected.lock().unwrap();
            connected.pulled = true;
            if let Some(shutdown) = &connected.shutdown {
                shutdown.shutdown();
            }
        }
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}
