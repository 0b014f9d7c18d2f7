//! `cube port-forward`: ports of this host that lead to ports inside a pod, for as long as the command runs.
#![forbid(unsafe_code)]

use std::io::{self, BufRead, BufReader};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;

use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};

use super::failure::Failure;
use super::images::print;
use super::signals::{Arrived, Signals};
use crate::client::{PodApi, base_directory};

/// Forward TCP ports of this host to a pod's own loopback, until the pod or this command ends.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cube port-forward web 8080:80
  cube port-forward web 0:80                any free port; which one is printed
  cube port-forward web 0.0.0.0:8080:80     not from this host alone

It needs no network of the pod's. A port that is to stay is published with `-p` when the pod starts.")]
pub(crate) struct PortForwardArgs {
    /// The pod.
    pod: String,

    /// The ports.
    #[arg(required = true, value_name = "[ADDRESS:]HOST:POD", value_parser = parse)]
    ports: Vec<Forward>,
}

/// A port of this host and one of the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Forward {
    listen: SocketAddr,
    port: u16,
}

/// `8080:80`, `0:80`, `0.0.0.0:8080:80`, `[::1]:8080:80`.
fn parse(text: &str) -> Result<Forward, String> {
    let parse = || {
        let (rest, pod) = text.rsplit_once(':')?;
        let (address, host) = match rest.rsplit_once(':') {
            Some((address, host)) => {
                let address = address.trim_start_matches('[').trim_end_matches(']');
                (address.parse().ok()?, host)
            }
            None => (IpAddr::V4(Ipv4Addr::LOCALHOST), rest),
        };
        Some(Forward {
            listen: SocketAddr::new(address, host.parse().ok()?),
            port: pod.parse().ok().filter(|port| *port != 0)?,
        })
    };
    parse().ok_or_else(|| "it is HOST:POD, such as 8080:80 or 127.0.0.1:8080:80".to_owned())
}

/// Runs `cube port-forward`.
pub(crate) fn run(arguments: &PortForwardArgs) -> Result<ExitCode, Failure> {
    let base = base_directory().map_err(Failure::new)?;
    let api = PodApi::of(&base, &arguments.pod);
    let mut signals = Signals::catch().map_err(Failure::new)?;
    // It ends with the pod, which is how this command learns of that.
    let mut events = api.follow("/v1/events?follow=1").map_err(Failure::new)?;
    let mut listeners = Vec::new();
    let mut text = String::new();
    for forward in &arguments.ports {
        let (listener, at) = listen(forward.listen)?;
        text += &format!("{at} leads to port {} of {}\n", forward.port, arguments.pod);
        listeners.push((listener, forward.port));
    }
    print(&text);
    loop {
        let mut fds = vec![
            PollFd::from_borrowed_fd(signals.interest(), PollFlags::IN),
            PollFd::from_borrowed_fd(events.get_ref().as_fd(), PollFlags::IN),
        ];
        fds.extend(listeners.iter().map(|(l, _)| PollFd::new(l, PollFlags::IN)));
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Failure::new(error)),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        if ready[1] && has_ended(&mut events) {
            return Err(Failure::new(format!("the pod {} has ended", arguments.pod)));
        }
        let ending = |arrived| matches!(arrived, Arrived::Forward(_));
        if signals.arrived().into_iter().any(ending) {
            return Ok(ExitCode::SUCCESS);
        }
        for ((listener, port), _) in listeners.iter().zip(&ready[2..]).filter(|(_, r)| **r) {
            serve(&api, listener, *port);
        }
    }
}

fn listen(address: SocketAddr) -> Result<(TcpListener, SocketAddr), Failure> {
    let listen = || {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        let at = listener.local_addr()?;
        Ok((listener, at))
    };
    listen().map_err(|e: io::Error| Failure::new(format!("cannot listen on {address}: {e}")))
}

/// Reads what events there are; whether they have ended.
fn has_ended(events: &mut BufReader<UnixStream>) -> bool {
    match events.fill_buf() {
        Ok([]) | Err(_) => true,
        Ok(bytes) => {
            let length = bytes.len();
            events.consume(length);
            false
        }
    }
}

/// Takes a connection and serves it in threads of its own: one that is slow delays no other.
fn serve(api: &PodApi, listener: &TcpListener, port: u16) {
    let Ok((client, _)) = listener.accept() else {
        // The client gave up, or this process has no descriptor left: the others go on.
        return;
    };
    let api = api.clone();
    let name = format!("port {port}");
    let work = move || {
        let relayed = api
            .upgrade(&format!("/v1/ports/{port}"))
            .map_err(|error| error.to_string())
            .and_then(|pod| relay(client, pod).map_err(|error| error.to_string()));
        if let Err(sentence) = relayed {
            eprintln!("cube: port {port}: {sentence}");
        }
    };
    // Without a thread the client sees its connection closed.
    let _ = thread::Builder::new().name(name).spawn(work);
}

/// Copies both ways until both sides have said all they had to say.
fn relay(client: TcpStream, pod: UnixStream) -> io::Result<()> {
    client.set_nonblocking(false)?;
    let (mut from_client, mut to_pod) = (client.try_clone()?, pod.try_clone()?);
    let there = thread::Builder::new().name("there".to_owned());
    let there = there.spawn(move || {
        // Whoever breaks the connection has no more to say.
        let _ = io::copy(&mut from_client, &mut to_pod);
        let _ = to_pod.shutdown(Shutdown::Write);
    })?;
    let (mut pod, mut client) = (pod, client);
    let _ = io::copy(&mut pod, &mut client);
    let _ = client.shutdown(Shutdown::Write);
    let _ = there.join();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn ports_are_read_as_people_write_them() {
        let forward = parse("8080:80").unwrap();
        assert_eq!(forward.listen, "127.0.0.1:8080".parse().unwrap());
        assert_eq!(forward.port, 80);
        assert_eq!(parse("0:80").unwrap().listen.port(), 0);
        let forward = parse("[::1]:53:54").unwrap();
        assert_eq!(
            (forward.listen, forward.port),
            ("[::1]:53".parse().unwrap(), 54)
        );
        for wrong in ["80", "80:0", ":80", "80:", "x:1:2", "70000:1", "1:2:3:4"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn each_side_ends_by_itself() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut inside, pod) = UnixStream::pair().unwrap();
        let accepted = listener.accept().unwrap().0;
        let relaying = thread::spawn(move || relay(accepted, pod));
        client.write_all(b"question").unwrap();
        client.shutdown(Shutdown::Write).unwrap();
        let mut asked = String::new();
        inside.read_to_string(&mut asked).unwrap();
        inside.write_all(b"answer").unwrap();
        drop(inside);
        let mut answered = String::new();
        client.read_to_string(&mut answered).unwrap();
        assert_eq!((asked.as_str(), answered.as_str()), ("question", "answer"));
        relaying.join().unwrap().unwrap();
    }
}
