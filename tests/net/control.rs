//! Config space and control queue.
use cube::vmm::virtio::net::tap::Offloads;

use crate::driver::{Buffer, F_VERSION_1, reg};
use crate::wire::{GUEST, OTHER, Options, PLAIN, feature, frame, guest, guest_with};

const OK: u8 = 0;
const ERR: u8 = 1;

#[test]
fn the_config_space_says_who_the_guest_is() {
    let guest = guest_with(Options {
        pairs: 4,
        mtu: 9000,
        ..Options::default()
    });
    let expected = [2, 0, 0, 0, 0, 1, 1, 0, 4, 0, 0x28, 0x23];
    assert_eq!(guest.driver.config::<12>(0), expected);
    assert_eq!(guest.driver.config::<2>(10), [0x28, 0x23]);
    assert_eq!(guest.driver.config::<2>(12), [0, 0]);
}

#[test]
fn the_link_leaves_undone_what_the_driver_agreed_to() {
    let guest = guest();
    assert_eq!(guest.link.lock().unwrap().offloads, Offloads::ALL);
    let guest = guest_with(Options {
        without: !(F_VERSION_1 | feature::CSUM),
        ..Options::default()
    });
    assert_eq!(guest.link.lock().unwrap().offloads, Offloads::NONE);
    // Half of USO is none of it.
    let guest = guest_with(Options {
        without: 1 << 54,
        ..Options::default()
    });
    let offloads = guest.link.lock().unwrap().offloads;
    assert!(!offloads.has_uso() && offloads.can_segment());
}

#[test]
fn queue_pairs_are_used_as_the_driver_says() {
    let mut guest = guest_with(Options {
        pairs: 4,
        ..Options::default()
    });
    let used = |guest: &crate::wire::Guest| guest.link.lock().unwrap().used;
    assert_eq!(used(&guest), 1);
    assert_eq!(guest.command(&[4, 0, 3, 0]), OK);
    assert_eq!(used(&guest), 3);
    for wrong in [&[4, 0, 0, 0][..], &[4, 0, 5, 0], &[4, 0, 1], &[4, 1, 1, 0]] {
        assert_eq!(guest.command(wrong), ERR, "{wrong:?}");
    }
    // Each pair has a link of its own.
    let frame = frame(GUEST, OTHER, 60);
    let at = guest.driver.alloc_with(&[&PLAIN[..], &frame].concat());
    guest
        .driver
        .call(5, &mut guest.queues[5], &[Buffer::read(at, 72)]);
    let mut bytes = [0; 100];
    assert_eq!(rustix::io::read(&guest.host[2], &mut bytes).unwrap(), 72);
    // One that is not used is not served.
    guest.queues[7].add(&[Buffer::read(at, 72)]);
    guest.driver.kick(7);
    guest.driver.settle();
    assert_eq!(guest.queues[7].used_index(), 0);
    assert_eq!(guest.command(&[4, 0, 4, 0]), OK);
    guest.driver.wait_used(&mut guest.queues[7]);
    // After a reset it is one pair again.
    guest.start_again();
    assert_eq!(used(&guest), 1);
    guest.still_works();
}

#[test]
fn without_multiqueue_the_control_queue_is_the_third() {
    let mut guest = guest_with(Options {
        pairs: 4,
        without: feature::MQ,
        ..Options::default()
    });
    assert_eq!(guest.command(&[0, 1, 1]), OK);
    assert_eq!(guest.command(&[4, 0, 1, 0]), ERR);
    guest.still_works();
}

#[test]
fn addresses_and_vlans_are_filtered_as_linux_asks() {
    let mut guest = guest();
    let mut table = vec![1, 0, 1, 0, 0, 0];
    table.extend(OTHER.0);
    table.extend([0; 4]);
    for command in [
        &[0, 0, 0][..],
        &[0, 1, 0],
        &table,
        &[2, 0, 7, 0],
        &[1, 1, 2, 0, 0, 0, 0, 9],
    ] {
        assert_eq!(guest.command(command), OK, "{command:?}");
    }
    let seven = [&OTHER.0[..], &GUEST.0, &[0x81, 0, 0, 7, 8, 0], &[7; 46]].concat();
    let eight = [&OTHER.0[..], &GUEST.0, &[0x81, 0, 0, 8, 8, 0], &[8; 46]].concat();
    guest.arrive(PLAIN, &frame(OTHER, GUEST, 60));
    guest.arrive(PLAIN, &eight);
    guest.arrive(PLAIN, &seven);
    let buffers = guest.buffers(50, 1526);
    assert_eq!(guest.received().1 as usize, 12 + seven.len());
    assert_eq!(guest.driver.bytes(buffers[0].1 + 30, 1), [7]);
    assert_eq!(guest.control.counters().received_filtered, 2);
    assert_eq!(guest.command(&[2, 1, 7, 0]), OK);
    assert_eq!(guest.command(&[2, 0, 0, 16]), ERR);
}

#[test]
fn malformed_commands_are_refused() {
    let mut guest = guest();
    let huge_table = [1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];
    let overlong = [1, 0, 2, 0, 0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0, 0];
    let zero_address = [1, 1, 0, 0, 0, 0, 0, 0];
    for wrong in [
        &[0][..],
        &[0, 0],
        &[0, 9, 1],
        &[9, 0, 1],
        &huge_table,
        &overlong,
        &zero_address,
    ] {
        assert_eq!(guest.command(wrong), ERR, "{wrong:?}");
    }
    // More addresses than the table holds: all pass.
    let many = [&[1, 0, 100, 0, 0, 0][..], &[2; 600], &[0; 4]].concat();
    assert_eq!(guest.command(&many), OK);
    assert_eq!(guest.command(&[0, 0, 0]), OK);
    guest.arrive(PLAIN, &frame(GUEST, OTHER, 60));
    guest.buffers(50, 1526);
    assert_eq!(guest.received().1, 72);
    // No byte for the answer: the device gives up.
    let at = guest.driver.alloc_with(&[0, 0, 0]);
    guest.queues[2].add(&[Buffer::read(at, 3)]);
    guest.driver.kick(2);
    guest.driver.wait_needs_reset();
    guest.start_again();
    guest.still_works();
}

#[test]
fn who_is_checked_keeps_its_address() {
    let mut guest = guest_with(Options {
        check_source: true,
        ..Options::default()
    });
    let own = [&[1, 1][..], &GUEST.0].concat();
    let other = [&[1, 1][..], &OTHER.0].concat();
    assert_eq!(guest.command(&own), OK);
    assert_eq!(guest.command(&other), ERR);
}

/// KVM may take the acknowledgement, so it changes nothing; one of a configuration change does.
#[test]
fn an_acknowledgement_of_used_buffers_means_nothing() {
    let mut guest = guest();
    let status = |guest: &crate::wire::Guest| guest.driver.read(reg::INTERRUPT_STATUS);
    assert_eq!(status(&guest), 1);
    guest.driver.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(status(&guest), 1);
    let generation = guest.driver.read(reg::CONFIG_GENERATION);
    guest.control.set_link(false);
    assert_eq!(guest.driver.wait_interrupt(), 3);
    assert_eq!(status(&guest), 1);
    assert_ne!(guest.driver.read(reg::CONFIG_GENERATION), generation);
    guest.start_again();
    assert_eq!(status(&guest), 1);
}
