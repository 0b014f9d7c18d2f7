//! A pod that serves for long: what comes and goes leaves nothing in its process or in `cube-init`.

use std::io::{Read, Write};
use std::net::Shutdown;

use cube::pod::api::body::{CreateExec, ExecCreated, Exit, Stats};

use crate::background::{Background, background, process};

/// Cycles in the suite; `cargo xtask soak` sets `CUBE_E2E_CYCLES`.
const CYCLES: usize = 300;
/// Before these everything has its size: buffers, the allocators' pools, the guest's caches.
const WARM_UP: usize = 40;

/// What must not grow.
#[derive(Debug)]
struct Footprint {
    /// Of the pod process, guest memory left out. Not its PSS, which changes with the machines of other tests.
    vmm_rss: u64,
    vmm_descriptors: usize,
    agent_rss: u64,
    agent_descriptors: u64,
}

impl Background {
    fn footprint(&self) -> Footprint {
        let stats: Stats = self.api.get("/v1/stats").unwrap();
        let descriptors = format!("/proc/{}/fd", self.pid().as_raw_nonzero());
        // When this one is answered, those before it are closed in the pod process too.
        let _held = self.api.follow("/v1/events?follow=1").unwrap();
        Footprint {
            vmm_rss: stats.vmm.unwrap().rss,
            vmm_descriptors: std::fs::read_dir(descriptors).unwrap().count(),
            agent_rss: stats.guest.agent.rss,
            agent_descriptors: stats.guest.agent.descriptors,
        }
    }

    /// The footprint once the guest has seen the ends of its streams, which follow the answers.
    fn settled(&self, before: &Footprint) -> Footprint {
        let mut now = self.footprint();
        for _ in 0..100 {
            if now.agent_descriptors <= before.agent_descriptors {
                break;
            }
            now = self.footprint();
        }
        now
    }

    /// Creates, starts, awaits and removes a container.
    fn cycle(&self, round: usize) {
        let id = format!("later{}", round % 3);
        self.create(&id, "echo hello > /file; cat /file; exit 5");
        self.post(&format!("/v1/containers/{id}/start"));
        assert_eq!(self.wait(&id), 5, "round {round}");
        self.remove(&id);
    }
}

#[test]
fn many_cycles_of_containers_leave_nothing_in_the_pod() {
    let cycles = std::env::var("CUBE_E2E_CYCLES").map_or(CYCLES, |n| n.parse().unwrap());
    let pod = background(&["sleep 1000000"]);
    (0..WARM_UP).for_each(|round| pod.cycle(round));
    let before = pod.footprint();
    for round in 0..cycles {
        pod.cycle(round);
        // For the soak, which shows it.
        if (round + 1) % 100 == 0 {
            eprintln!("  {} of {cycles} cycles", round + 1);
        }
    }
    let after = pod.settled(&before);
    let said = format!("before {before:?}, after {cycles} cycles {after:?}");
    eprintln!("{said}");
    assert_eq!(before.vmm_descriptors, after.vmm_descriptors, "{said}");
    assert!(
        after.agent_descriptors <= before.agent_descriptors,
        "{said}"
    );
    // The same for any number of cycles: 300 that leak a page each are over it.
    assert!(after.vmm_rss <= before.vmm_rss + (512 << 10), "{said}");
    assert!(after.agent_rss <= before.agent_rss + (256 << 10), "{said}");
    pod.stop();
}

/// Runs `cat` in the container and returns what comes back of `bytes`.
fn cat(pod: &Background, bytes: &[u8]) -> (Vec<u8>, u8) {
    let body = CreateExec {
        process: process("cat; exit 3"),
        stdin: true,
        terminal: None,
    };
    let path = "/v1/containers/c0/execs";
    let ExecCreated { exec } = pod.api.call("POST", path, &body).unwrap();
    let open = |stream| {
        let path = format!("/v1/execs/{exec}/attach/{stream}");
        pod.api.upgrade(&path).unwrap()
    };
    let (mut input, mut output) = (open("stdin"), open("stdout"));
    let mut received = Vec::new();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            input.write_all(bytes).unwrap();
            input.shutdown(Shutdown::Write).unwrap();
        });
        output.read_to_end(&mut received).unwrap();
    });
    let exit: Exit = pod.api.get(&format!("/v1/execs/{exec}/wait")).unwrap();
    (received, exit.exit_code)
}

#[test]
fn fifty_execs_at_once_get_their_own_bytes_back_and_leave_nothing() {
    let pod = background(&["sleep 1000000"]);
    let all = |pod: &Background| {
        std::thread::scope(|scope| {
            for seed in 0..50_u8 {
                scope.spawn(move || {
                    let sent: Vec<u8> = (0..100_000_u32).map(|n| (n % 251) as u8 ^ seed).collect();
                    let (received, code) = cat(pod, &sent);
                    assert!(received == sent && code == 3, "exec {seed}");
                });
            }
        });
    };
    all(&pod);
    let before = pod.footprint();
    all(&pod);
    let after = pod.settled(&before);
    let said = format!("before {before:?}, after {after:?}");
    eprintln!("{said}");
    assert!(
        after.agent_descriptors <= before.agent_descriptors,
        "{said}"
    );
    assert_eq!(before.vmm_descriptors, after.vmm_descriptors, "{said}");
    pod.stop();
}

#[test]
fn a_reader_that_stops_holds_its_credit_and_nobody_else() {
    let pod = background(&["sleep 1000000"]);
    // Once, so that every buffer there will be has its size.
    let sent: Vec<u8> = (0..2_000_000_u32).map(|n| (n % 251) as u8).collect();
    assert!(cat(&pod, &sent).0 == sent);
    let before = pod.footprint();
    let endless = CreateExec {
        process: process("exec cat /dev/zero"),
        stdin: false,
        terminal: None,
    };
    let path = "/v1/containers/c0/execs";
    let ExecCreated { exec } = pod.api.call("POST", path, &endless).unwrap();
    let path = format!("/v1/execs/{exec}/attach/stdout");
    let mut stopped = pod.api.upgrade(&path).unwrap();
    stopped.read_exact(&mut [0; 1000]).unwrap();
    // Others go on, and by the time they are done the endless one has filled whatever it may.
    for _ in 0..3 {
        assert!(cat(&pod, &sent).0 == sent);
    }
    let after = pod.footprint();
    let said = format!("before {before:?}, after {after:?}");
    eprintln!("{said}");
    // A piece here, one on its way, and the credit of one stream.
    assert!(after.vmm_rss <= before.vmm_rss + (512 << 10), "{said}");
    drop(stopped);
    let exit: Exit = pod.api.get(&format!("/v1/execs/{exec}/wait")).unwrap();
    assert_ne!(exit.exit_code, 0, "its pipe was closed");
    pod.stop();
}
