//! What stands in for `cube-vmm`, kernel and `cube-init`: this test program, started again by a script
//! with [`MODE`] set.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio as ChildStdio, exit};
use std::thread::{self, JoinHandle};

use cube::pod::stand_in;
use cube::vmm::exit::End;
use cube::vmm::spec::MachineSpec;
use cube_guest::frame;
use cube_guest::{
    Answer, CONTROL_PORT, ExitStatus, GuestEvent, GuestMessage, HostMessage, HostRequest,
    PROTOCOL_VERSION, PodSpec, STREAM_PORT, Stdio,
};
use std::os::unix::process::ExitStatusExt;

/// Names what the machine does; set by the fixture.
pub(crate) const MODE: &str = "CUBE_TEST_FAKE_MACHINE";
/// The machine's arguments, with spaces between.
pub(crate) const ARGUMENTS: &str = "CUBE_TEST_FAKE_ARGUMENTS";

#[test]
fn machine() {
    if let Ok(mode) = std::env::var(MODE) {
        Machine::read().run(mode.leak());
    }
    // Otherwise this checks what the other tests rely on: that it does act when told to.
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "fake_machine::machine"])
        .env(MODE, "dead on arrival")
        .env(ARGUMENTS, "")
        .output()
        .unwrap()
        .status;
    assert!(!status.success(), "a machine needs a specification");
}

struct Machine {
    spec: MachineSpec,
    pod: PodSpec,
}

fn descriptor(number: &str) -> File {
    File::open(format!("/proc/self/fd/{number}")).unwrap()
}

/// What follows the argument `name`.
fn value(name: &str) -> String {
    let arguments = std::env::var(ARGUMENTS).unwrap();
    let mut words = arguments.split(' ').skip_while(|word| *word != name);
    words.nth(1).unwrap().to_owned()
}

impl Machine {
    fn read() -> Self {
        let spec: MachineSpec = serde_json::from_reader(descriptor(&value("--spec-fd"))).unwrap();
        let pod = &spec.initramfs.as_ref().unwrap().files[0];
        assert_eq!(pod.path, "cube/pod.json");
        Self {
            pod: serde_json::from_str(&pod.content).unwrap(),
            spec,
        }
    }

    fn dial(&self, port: u32) -> UnixStream {
        let mut path = self
            .spec
            .vsock
            .as_ref()
            .unwrap()
            .path
            .clone()
            .into_os_string();
        path.push(format!("_{port}"));
        UnixStream::connect(PathBuf::from(path)).unwrap()
    }

    fn stream(&self, token: u64) -> UnixStream {
        let mut stream = self.dial(STREAM_PORT);
        stream.write_all(&token.to_le_bytes()).unwrap();
        stream
    }

    fn greet(&self, protocol: u32) -> UnixStream {
        let mut control = self.dial(CONTROL_PORT);
        let version = "9.9.9".to_owned();
        say(&mut control, &GuestMessage::Hello { protocol, version });
        control
    }

    /// What happens to a machine before its pod is served, or instead; the rest is its guest's.
    fn run(self, mode: &'static str) -> ! {
        let mut lifetime = descriptor(&value("--lifetime-fd"));
        match mode {
            "silent" => {
                eprintln!("silent");
                lifetime.read_to_end(&mut Vec::new()).unwrap();
                exit(129)
            }
            "panic" => {
                eprintln!("cube-vmm: the guest's kernel panicked\n  last words");
                exit(65)
            }
            _ => {}
        }
        let pod = descriptor(&value("--pod-fd"));
        let lifetime = Some(OwnedFd::from(lifetime));
        let end = stand_in::run(pod, lifetime, move || self.guest(mode)).unwrap();
        if end != End::PowerOff {
            eprintln!("cube-vmm: {end}");
        }
        exit(end.status().into())
    }

    fn guest(self, mode: &str) -> End {
        match mode {
            "run" => self.container(),
            "describe" => self.describe(),
            "other version" => wait(self.greet(PROTOCOL_VERSION + 1)),
            "garbage" => {
                let mut control = self.greet(PROTOCOL_VERSION);
                control.write_all(&[0xff; 64]).unwrap();
                wait(control)
            }
            "failed" => {
                let reason = "no disk image0".to_owned();
                let mut control = self.greet(PROTOCOL_VERSION);
                say(
                    &mut control,
                    &GuestMessage::Event(GuestEvent::Failed { reason }),
                );
                part(control)
            }
            "dies" => {
                let mut control = self.greet(PROTOCOL_VERSION);
                let [stdout, _] = self.outputs();
                started(&mut control);
                { stdout }.write_all(b"so far").unwrap();
                End::TripleFault { vcpu: 0 }
            }
            _ => panic!("no mode {mode}"),
        }
    }

    fn outputs(&self) -> [UnixStream; 2] {
        match self.pod.containers[0].process.stdio {
            Stdio::Pipes { stdout, stderr, .. } => {
                [stdout, stderr].map(|token| self.stream(token.unwrap()))
            }
            ref other => panic!("no pipes: {other:?}"),
        }
    }

    /// Writes what it was asked for to standard output.
    fn describe(self) -> End {
        let mut control = self.greet(PROTOCOL_VERSION);
        let [mut stdout, stderr] = self.outputs();
        started(&mut control);
        let json = serde_json::json!({ "machine": self.spec, "pod": self.pod });
        stdout.write_all(json.to_string().as_bytes()).unwrap();
        end(control, ExitStatus::Code(0), vec![stdout, stderr])
    }

    /// Runs the container's command here.
    fn container(self) -> End {
        let mut control = self.greet(PROTOCOL_VERSION);
        let process = &self.pod.containers[0].process;
        let mut command = Command::new(&process.argv[0]);
        command.args(&process.argv[1..]).stdin(ChildStdio::null());
        for (name, value) in process.env.iter().filter_map(|entry| entry.split_once('=')) {
            command.env(name, value);
        }
        let (mut child, streams, copies) = match process.stdio.clone() {
            Stdio::Terminal { token, size } => {
                let mut stream = self.stream(token);
                let text = format!("{} {}\r\n", size.rows, size.columns);
                stream.write_all(text.as_bytes()).unwrap();
                let child = command
                    .stdin(ChildStdio::piped())
                    .stdout(ChildStdio::piped())
                    .spawn();
                let mut child = child.unwrap();
                let input = (stream.try_clone().unwrap(), child.stdin.take().unwrap());
                thread::spawn(move || copy_in(input.0, input.1));
                let copy = copy_out(child.stdout.take().unwrap(), &stream);
                (child, vec![stream], vec![copy])
            }
            stdio => self.pipes(&mut command, &stdio),
        };
        started(&mut control);
        let terminal = match process.stdio {
            Stdio::Terminal { .. } => Some(streams[0].try_clone().unwrap()),
            _ => None,
        };
        obey(control.try_clone().unwrap(), &child, terminal);
        let status = child.wait().unwrap();
        copies.into_iter().for_each(|copy| copy.join().unwrap());
        let status = match (status.code(), status.signal()) {
            (Some(code), _) => ExitStatus::Code(code as u8),
            (_, signal) => ExitStatus::Signal {
                signal: signal.unwrap() as u8,
                oom_killed: false,
            },
        };
        end(control, status, streams)
    }

    fn pipes(
        &self,
        command: &mut Command,
        stdio: &Stdio,
    ) -> (Child, Vec<UnixStream>, Vec<JoinHandle<()>>) {
        let Stdio::Pipes { stdin, .. } = stdio else {
            panic!("no pipes: {stdio:?}");
        };
        let [stdout, stderr] = self.outputs();
        let input = stdin.map(|token| self.stream(token));
        if input.is_some() {
            command.stdin(ChildStdio::piped());
        }
        command
            .stdout(ChildStdio::piped())
            .stderr(ChildStdio::piped());
        let mut child = command.spawn().unwrap();
        if let Some(input) = input {
            let stdin = child.stdin.take().unwrap();
            thread::spawn(move || copy_in(input, stdin));
        }
        let copies = vec![
            copy_out(child.stdout.take().unwrap(), &stdout),
            copy_out(child.stderr.take().unwrap(), &stderr),
        ];
        (child, vec![stdout, stderr], copies)
    }
}

fn say(control: &mut UnixStream, message: &GuestMessage) {
    frame::write(control, message).unwrap();
}

fn started(control: &mut UnixStream) {
    let container = "main".to_owned();
    say(
        control,
        &GuestMessage::Event(GuestEvent::Started { container }),
    );
}

/// Copies until either side ends. Not `std::io::copy`, which splices: some kernels then hold bytes back.
fn copy(from: &mut impl Read, to: &mut impl Write) {
    let mut buffer = [0; 16 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

fn copy_in(mut from: UnixStream, mut to: impl Write) {
    copy(&mut from, &mut to);
}

fn copy_out(mut from: impl Read + Send + 'static, to: &UnixStream) -> JoinHandle<()> {
    let mut to = to.try_clone().unwrap();
    thread::spawn(move || {
        // A host that closed the stream breaks the pipe behind it.
        copy(&mut from, &mut to);
        drop(from);
        let _ = to.shutdown(Shutdown::Write);
    })
}

/// Does what the host asks for while the container runs.
fn obey(control: UnixStream, child: &Child, mut terminal: Option<UnixStream>) {
    let pid = rustix::process::Pid::from_child(child);
    thread::spawn(move || {
        let mut control = control;
        while let Ok(Some(HostMessage { id, request })) = frame::read(&mut control) {
            match request {
                HostRequest::Signal { signal, .. } => {
                    let signal = rustix::process::Signal::from_named_raw(signal.into()).unwrap();
                    let _ = rustix::process::kill_process(pid, signal);
                }
                HostRequest::Resize { size, .. } => {
                    let text = format!("resized {} {}\r\n", size.rows, size.columns);
                    let _ = terminal.as_mut().unwrap().write_all(text.as_bytes());
                }
                other => panic!("not expected: {other:?}"),
            }
            say(
                &mut control,
                &GuestMessage::Reply {
                    id,
                    result: Ok(Answer::Done),
                },
            );
        }
    });
}

/// Reports the end, waits until the host has everything, and powers off.
fn end(mut control: UnixStream, status: ExitStatus, streams: Vec<UnixStream>) -> End {
    let container = "main".to_owned();
    say(
        &mut control,
        &GuestMessage::Event(GuestEvent::Exited { container, status }),
    );
    for mut stream in streams {
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut Vec::new());
    }
    part(control)
}

fn part(control: UnixStream) -> End {
    control.shutdown(Shutdown::Write).unwrap();
    wait(control)
}

/// Waits until the host has closed the connection.
fn wait(mut control: UnixStream) -> End {
    let _ = control.read_to_end(&mut Vec::new());
    End::PowerOff
}

/// A script that starts this program as the machine, for `CUBE_VMM`.
pub(crate) fn script(directory: &std::path::Path) -> PathBuf {
    use std::os::unix::fs::PermissionsExt;
    let path = directory.join("fake-vmm");
    let program = std::env::current_exe().unwrap();
    let text = format!(
        "#!/bin/sh\nexport {ARGUMENTS}=\"$*\"\nexec '{}' --exact fake_machine::machine --nocapture\n",
        program.display()
    );
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}
