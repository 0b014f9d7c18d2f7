//! An agent whose containers and execs end by themselves, unless they are to `stay`.

use std::collections::BTreeMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use cube_guest::files::FileSet;
use cube_guest::frame;
use cube_guest::stats::{ContainerStats, PodStats, Usage};
use cube_guest::{
    Answer, CONTROL_PORT, ExitStatus, GuestEvent, GuestMessage, HostMessage, HostRequest,
    PROTOCOL_VERSION, ProcessId, ProcessSpec, STREAM_PORT, Stdio,
};

use crate::pod::listen::port_path;

/// The slot whose disk has no driver.
pub(super) const NO_DRIVER: u16 = 13;
/// What every file has in it.
pub(super) const CONTENT: &[u8] = b"the end of it";

fn dial(vsock: &Path, token: u64) -> UnixStream {
    let mut stream = UnixStream::connect(port_path(vsock, STREAM_PORT)).unwrap();
    stream.write_all(&token.to_le_bytes()).unwrap();
    stream
}

/// What the agent does with a process: its first word.
fn process(process: &ProcessSpec, vsock: &Path) -> (ExitStatus, Vec<UnixStream>) {
    if process.argv[0] == "mute" {
        // Its streams are lost.
        return (ExitStatus::Code(3), Vec::new());
    }
    let Stdio::Pipes {
        stdin,
        stdout,
        stderr,
    } = process.stdio
    else {
        panic!("{:?}", process.stdio);
    };
    let (mut out, err) = (dial(vsock, stdout.unwrap()), dial(vsock, stderr.unwrap()));
    let input = stdin.map(|token| dial(vsock, token));
    let mut open = vec![err];
    match process.argv[0].as_str() {
        "say" => {
            out.write_all(process.argv[1].as_bytes()).unwrap();
            out.write_all(b"\n").unwrap();
        }
        "cat" => {
            let copy = thread::spawn(move || io::copy(&mut input.unwrap(), &mut out).unwrap());
            open.clear();
            copy.join().unwrap();
        }
        _ => {
            open.push(out);
            open.extend(input);
        }
    }
    (ExitStatus::Code(3), open)
}

/// The same process, which says its second word.
fn said(process: &ProcessSpec) -> ProcessSpec {
    let mut process = process.clone();
    process.argv[0] = "say".to_owned();
    process
}

struct FakeAgent {
    vsock: PathBuf,
    control: Arc<Mutex<UnixStream>>,
    /// The streams of those that stay.
    staying: BTreeMap<String, Vec<UnixStream>>,
}

/// Runs until it is told to shut down; notes what it was asked in `asked`.
pub(super) fn run(vsock: PathBuf, over: Arc<AtomicBool>, asked: &Mutex<Vec<HostRequest>>) {
    let mut control = UnixStream::connect(port_path(&vsock, CONTROL_PORT)).unwrap();
    let mut agent = FakeAgent {
        vsock,
        control: Arc::new(Mutex::new(control.try_clone().unwrap())),
        staying: BTreeMap::new(),
    };
    agent.say(&GuestMessage::Hello {
        protocol: PROTOCOL_VERSION,
        version: "9.9.9".to_owned(),
    });
    while let Some(HostMessage { id, request }) = frame::read(&mut control).unwrap() {
        asked.lock().unwrap().push(request.clone());
        if matches!(request, HostRequest::Shutdown { .. }) {
            agent.reply(id, Ok(Answer::Done));
            over.store(true, Ordering::SeqCst);
            control.shutdown(Shutdown::Both).unwrap();
            return;
        }
        agent.obey(id, request);
    }
}

impl FakeAgent {
    fn say(&self, message: &GuestMessage) {
        frame::write(&mut *self.control.lock().unwrap(), message).unwrap();
    }

    fn reply(&self, id: u64, result: Result<Answer, String>) {
        self.say(&GuestMessage::Reply { id, result });
    }

    fn obey(&mut self, id: u64, request: HostRequest) {
        match request {
            HostRequest::Start(spec) => {
                self.reply(id, Ok(Answer::Done));
                let container = spec.id.clone();
                self.say(&GuestMessage::Event(GuestEvent::Started {
                    container: container.clone(),
                }));
                let (status, open) = process(&spec.process, &self.vsock);
                if spec.process.argv[0] == "stay" {
                    self.staying.insert(container, open);
                } else {
                    self.exited(container, status);
                }
            }
            HostRequest::Exec {
                exec,
                process: what,
                ..
            } => {
                self.reply(id, Ok(Answer::Done));
                self.exec(exec, what);
            }
            HostRequest::Signal {
                process: ProcessId::Container(container),
                signal,
                ..
            } => {
                self.reply(id, Ok(Answer::Done));
                self.staying.remove(&container);
                let oom_killed = false;
                self.exited(container, ExitStatus::Signal { signal, oom_killed });
            }
            HostRequest::BindSlot { slot: NO_DRIVER } => self.reply(id, Err("no driver".into())),
            HostRequest::AddVolume(spec) if spec.name == "bad" => {
                self.reply(id, Err("no such file system".into()));
            }
            HostRequest::UnbindSlot { slot: 0 } if self.staying.contains_key("user") => {
                self.reply(id, Err("a container has it".into()));
            }
            HostRequest::WriteFiles { token, .. } => self.write_files(id, token),
            HostRequest::ReadFile { path, .. } if path == "/missing" => {
                self.reply(id, Err("there is no such file".into()));
            }
            HostRequest::ReadFile {
                max_bytes, token, ..
            } => {
                let size = CONTENT.len() as u64;
                let sent = size.min(max_bytes);
                self.reply(id, Ok(Answer::File { size, sent }));
                let from = CONTENT.len() - sent as usize;
                dial(&self.vsock, token)
                    .write_all(&CONTENT[from..])
                    .unwrap();
            }
            HostRequest::Forward { port: 82, .. } => self.reply(id, Ok(Answer::Done)),
            HostRequest::Forward { port: 81, .. } => self.reply(id, Err("nobody listens".into())),
            HostRequest::Forward { token, .. } => {
                self.reply(id, Ok(Answer::Done));
                let mut stream = dial(&self.vsock, token);
                // A server that reads a line, answers, and closes without waiting for the client's end.
                thread::spawn(move || {
                    let mut line = String::new();
                    BufReader::new(&stream).read_line(&mut line).unwrap();
                    stream.write_all(format!("got {line}").as_bytes()).unwrap();
                });
            }
            HostRequest::Stats => self.reply(id, Ok(Answer::Stats(Box::new(stats())))),
            _ => self.reply(id, Ok(Answer::Done)),
        }
    }

    fn exec(&self, exec: String, what: Box<ProcessSpec>) {
        let (control, vsock) = (self.control.clone(), self.vsock.clone());
        thread::spawn(move || {
            let say_the_end = |status| {
                let ended = GuestMessage::Event(GuestEvent::ExecExited { exec, status });
                frame::write(&mut *control.lock().unwrap(), &ended).unwrap();
            };
            if what.argv[0] == "late" {
                say_the_end(ExitStatus::Code(3));
                return drop(process(&said(&what), &vsock));
            }
            say_the_end(process(&what, &vsock).0);
        });
    }

    fn exited(&self, container: String, status: ExitStatus) {
        self.say(&GuestMessage::Event(GuestEvent::Exited {
            container,
            status,
        }));
    }

    /// Takes a set; one with a file called `no` is refused before its contents are read.
    fn write_files(&self, id: u64, token: u64) {
        let mut stream = dial(&self.vsock, token);
        let set: FileSet = frame::read(&mut stream).unwrap().unwrap();
        if set.files.iter().any(|file| file.path == "no") {
            return self.reply(id, Err("not this file".into()));
        }
        let mut content = Vec::new();
        stream.read_to_end(&mut content).unwrap();
        let expected: u64 = set.files.iter().map(|file| file.size).sum();
        assert_eq!(content.len() as u64, expected);
        self.reply(id, Ok(Answer::Done));
    }
}

fn stats() -> PodStats {
    let usage = Usage {
        pids: 4,
        ..Usage::default()
    };
    PodStats {
        containers: vec![ContainerStats {
            id: "measured".to_owned(),
            usage,
            writable: None,
        }],
        ..PodStats::default()
    }
}
