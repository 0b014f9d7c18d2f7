//! A guest spoken to in its own protocol: `cube-vmm` with busybox and four empty disks, and this test as
//! the host behind its vsock device.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as ChildStdio};
use std::thread::JoinHandle;

use cube::image::Store;
use cube::vmm::spec::{
    DiskPart, DiskSpec, FileSource, InitramfsFile, InitramfsSpec, MachineSpec, VsockSpec,
};
use cube_guest::files::{FileEntry, FileSet};
use cube_guest::frame;
use cube_guest::{
    Answer, CONTROL_PORT, ContainerSpec, ExitStatus, GuestEvent, GuestMessage, HostMessage,
    HostRequest, POD_SPEC_PATH, PodSpec, ProcessSpec, RootFs, STREAM_PORT, Stdio, TerminalSize,
};

use crate::fixture::{BUSYBOX, given, import, text};

/// Serials of the writable disks, in the order of their slots; the image's is slot 0.
pub(crate) const DISKS: [&str; 4] = ["rw1", "rw2", "rw3", "rw4"];
/// Bytes of each.
const DISK_SIZE: u64 = 64 << 20;

/// The guest. Dropping it kills the machine.
pub(crate) struct Guest {
    vmm: Child,
    control: UnixStream,
    streams: UnixListener,
    /// Streams that were dialled before anybody asked for them.
    early: Vec<(u64, UnixStream)>,
    events: Vec<GuestEvent>,
    replies: Vec<(u64, Result<Answer, String>)>,
    /// The last id or token given.
    last: u64,
    _directory: tempfile::TempDir,
}

/// How a process ended and what it said.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// A process that runs.
pub(crate) struct Running {
    pub(crate) stdin: Option<UnixStream>,
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
}

/// A container of busybox that runs `script`.
pub(crate) fn container(id: &str, script: &str) -> ContainerSpec {
    ContainerSpec {
        id: id.to_owned(),
        rootfs: RootFs {
            image: "image0".into(),
            ..RootFs::default()
        },
        process: process(script),
        ..ContainerSpec::default()
    }
}

/// A process that runs `script` in a shell.
pub(crate) fn process(script: &str) -> ProcessSpec {
    ProcessSpec {
        argv: ["sh", "-c", script].map(str::to_owned).into(),
        ..ProcessSpec::default()
    }
}

fn machine(directory: &Path, pod: &PodSpec) -> MachineSpec {
    let store = Store::open(import(BUSYBOX, "CUBE_TEST_IMAGE")).unwrap();
    let part = |path: PathBuf, size| DiskPart {
        file: FileSource::Path(path),
        size: Some(size),
    };
    let image = store.resolve(BUSYBOX).unwrap().disk_parts();
    let mut disks = vec![DiskSpec {
        serial: "image0".into(),
        parts: image
            .into_iter()
            .map(|(path, size)| part(path, size))
            .collect(),
        read_only: true,
    }];
    for serial in DISKS {
        let path = directory.join(serial);
        store.writable().clone_to(DISK_SIZE, &path).unwrap();
        disks.push(DiskSpec {
            serial: serial.into(),
            parts: vec![part(path, DISK_SIZE)],
            read_only: false,
        });
    }
    MachineSpec {
        kernel: FileSource::Path(given("CUBE_KERNEL")),
        initramfs: Some(InitramfsSpec {
            init: FileSource::Path(given("CUBE_INIT")),
            files: vec![InitramfsFile {
                path: POD_SPEC_PATH.trim_start_matches('/').into(),
                content: serde_json::to_string(pod).unwrap(),
            }],
        }),
        command_line: String::new(),
        cpus: 1,
        memory_mib: 256,
        huge_pages: false,
        disks,
        vsock: Some(VsockSpec {
            cid: 3,
            path: directory.join("vsock"),
        }),
        rng: true,
        nets: Vec::new(),
        spare_slots: 2,
        cpuid: None,
        console: None,
    }
}

/// A guest with an empty pod.
pub(crate) fn guest() -> Guest {
    Guest::boot(&PodSpec::default())
}

impl Guest {
    /// Boots `pod` and waits for the agent's greeting.
    pub(crate) fn boot(pod: &PodSpec) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let listen = |port: u32| {
            let path = directory.path().join(format!("vsock_{port}"));
            UnixListener::bind(path).unwrap()
        };
        let (control, streams) = (listen(CONTROL_PORT), listen(STREAM_PORT));
        let spec = directory.path().join("machine.json");
        let machine = machine(directory.path(), pod);
        fs::write(&spec, serde_json::to_vec(&machine).unwrap()).unwrap();
        let vmm = Command::new(env!("CARGO_BIN_EXE_cube-vmm"))
            .arg("--spec")
            .arg(&spec)
            .stdin(ChildStdio::null())
            .stdout(ChildStdio::null())
            .stderr(File::create(directory.path().join("messages")).unwrap())
            .spawn()
            .unwrap();
        let control = control.accept().unwrap().0;
        let mut guest = Self {
            vmm,
            control,
            streams,
            early: Vec::new(),
            events: Vec::new(),
            replies: Vec::new(),
            last: 0,
            _directory: directory,
        };
        match frame::read(&mut guest.control).unwrap() {
            Some(GuestMessage::Hello { protocol, .. }) => {
                assert_eq!(protocol, cube_guest::PROTOCOL_VERSION);
            }
            other => panic!("no greeting: {other:?}"),
        }
        guest
    }

    /// A number that was not given before.
    pub(crate) fn number(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Sends a request; returns its id.
    pub(crate) fn send(&mut self, request: HostRequest) -> u64 {
        let id = self.number();
        frame::write(&mut self.control, &HostMessage { id, request }).unwrap();
        id
    }

    /// Waits for the reply to the request `id`.
    pub(crate) fn reply(&mut self, id: u64) -> Result<Answer, String> {
        loop {
            if let Some(at) = self.replies.iter().position(|(other, _)| *other == id) {
                return self.replies.remove(at).1;
            }
            self.hear();
        }
    }

    /// Asks and waits for the answer.
    pub(crate) fn ask(&mut self, request: HostRequest) -> Result<Answer, String> {
        let id = self.send(request);
        self.reply(id)
    }

    /// Asks for what must be done.
    pub(crate) fn must(&mut self, request: HostRequest) {
        assert_eq!(self.ask(request), Ok(Answer::Done));
    }

    /// Asks for what must be refused; returns the sentence.
    pub(crate) fn refused(&mut self, request: HostRequest) -> String {
        self.ask(request).unwrap_err()
    }

    fn hear(&mut self) {
        match frame::read(&mut self.control).unwrap() {
            Some(GuestMessage::Reply { id, result }) => self.replies.push((id, result)),
            Some(GuestMessage::Event(event)) => self.events.push(event),
            other => panic!("not expected: {other:?}"),
        }
    }

    /// Waits for an event that `wanted` takes.
    pub(crate) fn event<T>(&mut self, wanted: impl Fn(&GuestEvent) -> Option<T>) -> T {
        loop {
            let found = self.events.iter().enumerate();
            let found = found.filter_map(|(at, event)| Some((at, wanted(event)?)));
            if let Some((at, value)) = found.into_iter().next() {
                self.events.remove(at);
                return value;
            }
            self.hear();
        }
    }

    /// Waits for the end of a container.
    pub(crate) fn exited(&mut self, id: &str) -> ExitStatus {
        self.event(|event| match event {
            GuestEvent::Exited { container, status } if container == id => Some(status.clone()),
            _ => None,
        })
    }

    /// Waits for the end of an exec.
    pub(crate) fn exec_exited(&mut self, id: &str) -> ExitStatus {
        self.event(|event| match event {
            GuestEvent::ExecExited { exec, status } if exec == id => Some(status.clone()),
            _ => None,
        })
    }

    /// Waits until a container runs.
    pub(crate) fn started(&mut self, id: &str) {
        self.event(|event| match event {
            GuestEvent::Started { container } if container == id => Some(()),
            GuestEvent::Exited { container, status } if container == id => {
                panic!("{container} was not started: {status:?}")
            }
            _ => None,
        });
    }

    /// Waits for the stream `token`.
    pub(crate) fn stream(&mut self, token: u64) -> UnixStream {
        loop {
            if let Some(at) = self.early.iter().position(|(other, _)| *other == token) {
                return self.early.remove(at).1;
            }
            let mut stream = self.streams.accept().unwrap().0;
            let mut name = [0; 8];
            stream.read_exact(&mut name).unwrap();
            self.early.push((u64::from_le_bytes(name), stream));
        }
    }

    /// Gives a process pipes of which this side has the ends once it was asked for.
    pub(crate) fn pipes(&mut self, with_input: bool) -> Stdio {
        Stdio::Pipes {
            stdin: with_input.then(|| self.number()),
            stdout: Some(self.number()),
            stderr: Some(self.number()),
        }
    }

    /// Gives a process a terminal; its stream is the token.
    pub(crate) fn terminal(&mut self) -> (Stdio, u64) {
        let token = self.number();
        let size = TerminalSize {
            rows: 24,
            columns: 80,
        };
        (Stdio::Terminal { token, size }, token)
    }

    fn attach(&mut self, stdio: &Stdio) -> Running {
        let Stdio::Pipes {
            stdin,
            stdout,
            stderr,
        } = *stdio
        else {
            panic!("no pipes: {stdio:?}");
        };
        Running {
            stdin: stdin.map(|token| self.stream(token)),
            stdout: collect(self.stream(stdout.unwrap())),
            stderr: collect(self.stream(stderr.unwrap())),
        }
    }

    /// Starts a container without looking at its streams: it has none.
    pub(crate) fn start(&mut self, spec: ContainerSpec) {
        let id = spec.id.clone();
        self.must(HostRequest::Start(Box::new(spec)));
        self.started(&id);
    }

    /// Runs a container to its end.
    pub(crate) fn run(&mut self, mut spec: ContainerSpec) -> Ran {
        spec.process.stdio = self.pipes(false);
        let (id, stdio) = (spec.id.clone(), spec.process.stdio.clone());
        self.must(HostRequest::Start(Box::new(spec)));
        let running = self.attach(&stdio);
        let status = self.exited(&id);
        running.ran(status)
    }

    /// Runs a container to its end and removes it; returns what it said if it succeeded.
    pub(crate) fn say(&mut self, spec: ContainerSpec) -> String {
        let container = spec.id.clone();
        let ran = self.run(spec);
        assert_eq!(ran.status, ExitStatus::Code(0), "{ran:?}");
        self.must(HostRequest::Remove { container });
        ran.stdout
    }

    /// Starts a process in a container.
    pub(crate) fn begin(&mut self, container: &str, exec: &str, process: ProcessSpec) -> Running {
        let mut process = process;
        process.stdio = self.pipes(true);
        let stdio = process.stdio.clone();
        self.must(HostRequest::Exec {
            container: container.into(),
            exec: exec.into(),
            process: Box::new(process),
        });
        self.attach(&stdio)
    }

    /// Runs a process in a container to its end.
    pub(crate) fn exec(&mut self, container: &str, process: ProcessSpec) -> Ran {
        let exec = format!("exec{}", self.number());
        let mut running = self.begin(container, &exec, process);
        running.stdin = None;
        let status = self.exec_exited(&exec);
        running.ran(status)
    }

    /// Runs `script` in a container; returns what it said if it succeeded.
    pub(crate) fn shell(&mut self, container: &str, script: &str) -> String {
        let ran = self.exec(container, process(script));
        assert_eq!(ran.status, ExitStatus::Code(0), "{ran:?}");
        ran.stdout
    }

    /// Kills a container and removes it.
    pub(crate) fn end(&mut self, container: &str) {
        self.must(signal(container, 9, false));
        self.exited(container);
        let container = container.to_owned();
        self.must(HostRequest::Remove { container });
    }

    /// Writes files into a volume: paths and contents, all with mode 0644.
    pub(crate) fn write_files(
        &mut self,
        volume: &str,
        files: &[(&str, &str)],
    ) -> Result<Answer, String> {
        let (token, volume) = (self.number(), volume.to_owned());
        let id = self.send(HostRequest::WriteFiles { volume, token });
        let entry = |(path, content): &(&str, &str)| FileEntry {
            path: (*path).to_owned(),
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: content.len() as u64,
        };
        let set = FileSet {
            files: files.iter().map(entry).collect(),
        };
        let mut stream = self.stream(token);
        // The guest may refuse the set before all of it was sent.
        let _ = stream.write_all(&frame::encode(&set).unwrap());
        for (_, content) in files {
            let _ = stream.write_all(content.as_bytes());
        }
        self.reply(id)
    }

    /// Reads a file's end.
    pub(crate) fn read_file(
        &mut self,
        container: &str,
        path: &str,
        max_bytes: u64,
    ) -> Result<(u64, String), String> {
        let token = self.number();
        let answer = self.ask(HostRequest::ReadFile {
            container: container.into(),
            path: path.into(),
            max_bytes,
            token,
        })?;
        let Answer::File { size, sent } = answer else {
            panic!("not a file: {answer:?}");
        };
        let content = collect(self.stream(token)).join().unwrap();
        assert_eq!(content.len() as u64, sent);
        Ok((size, content))
    }

    /// Ends the pod in good order.
    pub(crate) fn shut_down(mut self) {
        self.must(HostRequest::Shutdown { grace_ms: 0 });
        let mut said = || frame::read::<GuestMessage>(&mut self.control).unwrap();
        while said().is_some() {}
        self.control.shutdown(Shutdown::Both).unwrap();
        let status = self.vmm.wait().unwrap();
        assert_eq!(status.code(), Some(0), "the guest did not power off");
    }
}

impl Running {
    /// Waits for the end of its output.
    pub(crate) fn ran(self, status: ExitStatus) -> Ran {
        drop(self.stdin);
        Ran {
            status,
            stdout: self.stdout.join().unwrap(),
            stderr: self.stderr.join().unwrap(),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.vmm.kill();
        let _ = self.vmm.wait();
        if std::thread::panicking() {
            let messages = fs::read(self._directory.path().join("messages"));
            eprintln!("cube-vmm said: {}", text(&messages.unwrap_or_default()));
            eprintln!("events not asked for: {:?}", self.events);
        }
    }
}

/// Reads a stream to its end, then closes it, as a host does.
fn collect(mut stream: UnixStream) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        text(&bytes)
    })
}

/// A signal for a container.
pub(crate) fn signal(container: &str, signal: u8, all: bool) -> HostRequest {
    HostRequest::Signal {
        process: cube_guest::ProcessId::Container(container.into()),
        signal,
        all,
    }
}
