//! A pod whose machine and guest are played by whoever calls, so that what speaks with pods can be tried where no
//! guest can run. All else is the pod process's own: supervisor, session with the agent, streams, API.
#![forbid(unsafe_code)]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;

use super::machinery;
use super::supervisor::Supervisor;
use crate::vmm::command::Attendant;
use crate::vmm::exit::{End, Ending};

/// Supervises the pod that `file` describes, as [`super::supervisor::open`] does, until `guest` returns how its machine
/// ended, or there is a reason to end it. `guest` is called on a thread of its own when the guest can dial, and is left
/// there when the pod ends first.
///
/// # Errors
/// A sentence for a person.
pub fn run(
    file: File,
    lifetime: Option<OwnedFd>,
    guest: impl FnOnce() -> End + Send + 'static,
) -> Result<End, String> {
    let mut supervisor = Supervisor::of(file, lifetime)?;
    let ending = Arc::new(Ending::new().map_err(|error| error.to_string())?);
    let reported = Arc::clone(&ending);
    thread::spawn(move || reported.report(guest()));
    let end = loop {
        let ready = supervisor.wait(&[ending.event()]);
        let end = ready.and_then(|ready| supervisor.turn(&machinery::Ended, &ready));
        let end = end.map_err(|error| error.to_string())?;
        if let Some(end) = ending.first().or(end) {
            break end;
        }
    };
    Box::new(supervisor).ended(&end);
    Ok(end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::{Read, Write};
    use std::os::fd::{AsRawFd, IntoRawFd};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::path::{Path, PathBuf};
    use std::sync::mpsc::channel;

    use cube_guest::frame;
    use cube_guest::{
        CONTROL_PORT, ContainerSpec, GuestEvent, GuestMessage, PROTOCOL_VERSION, PodSpec,
        ProcessSpec, STREAM_PORT, Stdio,
    };

    use crate::pod::listen::port_path;
    use crate::pod::supervisor::{API_SOCKET, FirstContainer, PodFile, VSOCK_SOCKET};
    use crate::vmm::exit::StopCause;

    /// The container's standard output.
    const TOKEN: u64 = 7;

    /// A pod of one container, which keeps no log, in `directory`.
    fn pod(directory: &Path) -> File {
        fs::create_dir(directory).unwrap();
        let lock = File::open(directory).unwrap();
        let api = UnixListener::bind(directory.join(API_SOCKET)).unwrap();
        let container = ContainerSpec {
            id: "main".to_owned(),
            process: ProcessSpec {
                stdio: Stdio::Pipes {
                    stdin: None,
                    stdout: Some(TOKEN),
                    stderr: None,
                },
                ..ProcessSpec::default()
            },
            ..ContainerSpec::default()
        };
        let first = FirstContainer {
            slots: vec![0, 1],
            log_path: None,
            stdin_once: true,
        };
        let pod = PodFile {
            id: "p".to_owned(),
            directory: directory.to_owned(),
            lock_fd: lock.into_raw_fd(),
            api_fd: api.into_raw_fd(),
            volume_slots: BTreeMap::new(),
            network_lock_fd: None,
            guest: PodSpec {
                containers: vec![container],
                ..PodSpec::default()
            },
            containers: BTreeMap::from([("main".to_owned(), first)]),
        };
        let mut file = tempfile::tempfile().unwrap();
        serde_json::to_writer(&mut file, &pod).unwrap();
        std::io::Seek::rewind(&mut file).unwrap();
        file
    }

    /// Plays a guest whose container runs, up to its standard output.
    fn boot(directory: PathBuf) -> [UnixStream; 2] {
        let dial = |port| UnixStream::connect(port_path(&directory.join(VSOCK_SOCKET), port));
        let mut control = dial(CONTROL_PORT).unwrap();
        let hello = GuestMessage::Hello {
            protocol: PROTOCOL_VERSION,
            version: "9.9.9".to_owned(),
        };
        frame::write(&mut control, &hello).unwrap();
        let mut stdout = dial(STREAM_PORT).unwrap();
        stdout.write_all(&TOKEN.to_le_bytes()).unwrap();
        let container = "main".to_owned();
        let started = GuestMessage::Event(GuestEvent::Started { container });
        frame::write(&mut control, &started).unwrap();
        [control, stdout]
    }

    /// Attaches to the standard output of a pod that may not serve yet, and has read the answer.
    fn attach(directory: &Path) -> impl FnOnce() -> UnixStream {
        let mut client = UnixStream::connect(directory.join(API_SOCKET)).unwrap();
        let head = "GET /v1/containers/main/attach/stdout HTTP/1.1\r\nHost: pod\r\n\
                    Connection: Upgrade\r\nUpgrade: cube-stream\r\n\r\n";
        client.write_all(head.as_bytes()).unwrap();
        move || {
            let mut answer = Vec::new();
            let mut byte = [0];
            while !answer.ends_with(b"\r\n\r\n") {
                client.read_exact(&mut byte).unwrap();
                answer.push(byte[0]);
            }
            client
        }
    }

    #[test]
    fn what_its_command_is_slow_to_take_outlives_the_machine() {
        // More than a socket holds, and less than all that it passes through hold.
        const LENGTH: usize = 300_000;
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("p");
        let file = pod(&directory);
        let (lifetime, _held) = std::io::pipe().unwrap();
        let client = attach(&directory);
        let (died, dies) = channel();
        let place = directory.clone();
        let guest = move || {
            let [control, mut stdout] = boot(place);
            stdout.write_all(&[b'x'; LENGTH]).unwrap();
            // Its end is not to be seen before the machine's.
            died.send(control).unwrap();
            End::TripleFault { vcpu: 0 }
        };
        let pod = thread::spawn(move || run(file, Some(lifetime.into()), guest).unwrap());
        let _control = dies.recv().unwrap();
        let mut all = Vec::new();
        client().read_to_end(&mut all).unwrap();
        assert_eq!(all.len(), LENGTH);
        assert_eq!(pod.join().unwrap(), End::TripleFault { vcpu: 0 });
        assert!(!directory.exists());
    }

    #[test]
    fn a_pod_ends_with_its_lifetime_and_leaves_nothing() {
        let base = tempfile::tempdir().unwrap();
        let directory = base.path().join("p");
        let file = pod(&directory);
        let (lifetime, held) = std::io::pipe().unwrap();
        let client = attach(&directory);
        let place = directory.clone();
        let guest = move || {
            let [mut control, mut stdout] = boot(place);
            // Its client never reads: a pod that waited for it would be here for ever.
            while stdout.write(&[b'x'; 4096]).is_ok() {}
            let _ = control.read_to_end(&mut Vec::new());
            End::PowerOff
        };
        let pod = thread::spawn(move || run(file, Some(lifetime.into()), guest).unwrap());
        let client = client();
        assert!(client.as_raw_fd() > 0 && directory.exists());
        drop(held);
        let end = pod.join().unwrap();
        assert_eq!(end, End::Stopped(StopCause::LifetimeEnded));
        assert!(!directory.exists());
    }
}
