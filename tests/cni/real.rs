//! The plug-ins that packages bring.
use std::io::ErrorKind;
use std::os::fd::OwnedFd;

use cube::net::PortMapping;
use rustix::event::{PollFd, PollFlags, poll};

use crate::fixture::{host, v4};

/// Reads frames from the tap until `wanted` finds one.
fn frame(tap: &OwnedFd, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut buffer = [0; 70_000];
    loop {
        match rustix::io::read(tap, &mut buffer) {
            Ok(len) if wanted(&buffer[12..len]) => return buffer[12..len].to_vec(),
            Ok(_) => {}
            Err(error) if std::io::Error::from(error).kind() == ErrorKind::WouldBlock => {
                poll(&mut [PollFd::new(tap, PollFlags::IN)], None).unwrap();
            }
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn what_the_host_sends_to_the_pod_arrives_at_the_tap_and_back() {
    let host = host();
    let (attachment, taps) = host
        .networks()
        .attach(&host.bridge(&[], &[]), "there", &[], 1)
        .unwrap();
    let address = v4(&attachment);
    let mac = attachment.interface().mac;
    assert_eq!((attachment.mtu(), attachment.addresses().len()), (1500, 2));
    assert_eq!(attachment.interface().routes.len(), 2);

    // The host asks who has the pod's address; the pod answers; what the host wants to send follows.
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.send_to(b"hello", (address.as_str(), 9)).unwrap();
    let request = frame(&taps[0], |frame| frame[12..14] == [8, 6]);
    let (host_mac, host_ip) = (&request[22..28], &request[28..32]);
    let answer = [
        &[0; 12][..],
        host_mac,
        &mac.0,
        &[8, 6, 0, 1, 8, 0, 6, 4, 0, 2],
        &mac.0,
        &request[38..42],
        host_mac,
        host_ip,
    ]
    .concat();
    rustix::io::write(&taps[0], &answer).unwrap();
    let packet = frame(&taps[0], |frame| frame[12..14] == [8, 0] && frame[23] == 17);
    assert!(packet[..6] == mac.0 && packet.ends_with(b"hello"));
    let neighbours = host.run("ip neigh show dev cube0");
    assert!(
        neighbours.contains(&format!("{address} lladdr {mac}")),
        "{neighbours}"
    );
    attachment.undo().unwrap();
    host.assert_nothing_left("there");
}

#[test]
fn many_pods_leave_nothing() {
    let host = host();
    let config = host.bridge(&[], &[]);
    let port = |n: usize| PortMapping {
        host_port: 8000 + n as u16,
        container_port: 80,
        protocol: "tcp".into(),
        host_ip: None,
    };
    let many: usize = std::env::var("CUBE_TEST_PODS").map_or(8, |n| n.parse().unwrap());
    let pods: Vec<_> = (0..many)
        .map(|n| {
            let pod = format!("many{n}");
            (
                host.networks()
                    .attach(&config, &pod, &[port(n)], 2)
                    .unwrap(),
                pod,
            )
        })
        .collect();
    let addresses: std::collections::BTreeSet<_> = pods.iter().map(|((a, _), _)| v4(a)).collect();
    assert_eq!(addresses.len(), many);
    let listed = host.networks().list().unwrap();
    assert!(listed.len() == many && listed.iter().all(|(_, lives)| *lives));
    assert!(host.run("iptables-save").contains("--to-destination"));
    for ((attachment, _taps), pod) in pods {
        assert_ne!(host.traces(&pod), "[] [] ");
        attachment.undo().unwrap();
    }
    (0..many).for_each(|n| host.assert_nothing_left(&format!("many{n}")));
}

#[test]
fn a_namespace_that_is_gone_is_no_obstacle() {
    let host = host();
    let config = host.bridge(&[], &[]);
    let (attachment, taps) = host.networks().attach(&config, "gone", &[], 1).unwrap();
    drop(taps);
    host.run("ip netns del cube-gone");
    attachment.undo().unwrap();
    // The bridge plug-in 1.1.1 leaves its masquerading rules then; everything else is gone.
    host.run("iptables -t nat -F; ip6tables -t nat -F");
    host.assert_nothing_left("gone");
}

#[test]
fn check_finds_what_somebody_else_has_changed() {
    let host = host();
    let (_attachment, _taps) = host
        .networks()
        .attach(&host.bridge(&[], &[]), "check", &[], 1)
        .unwrap();
    let record = host.networks().list().unwrap().remove(0).0;
    host.networks().check(&record).unwrap();
    host.run("ip netns exec cube-check ip -4 addr flush dev eth0");
    let error = host.networks().check(&record).unwrap_err().to_string();
    assert!(error.contains("`bridge` (CHECK"), "{error}");
}

#[test]
fn a_large_mtu_is_the_guests_too() {
    let host = host();
    let mut config = host.bridge(&[], &[]).source().clone();
    config["plugins"][0]["mtu"] = 9000.into();
    let path = std::path::Path::new("/test.conflist");
    let config = cube::net::NetworkConfig::from_value(config, path).unwrap();
    let (attachment, _taps) = host.networks().attach(&config, "large", &[], 1).unwrap();
    assert_eq!(attachment.interface().mtu, Some(9000));
    assert!(
        host.run("ip netns exec cube-large ip link show tap0")
            .contains("mtu 9000")
    );
}
