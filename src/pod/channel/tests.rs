use rustix::event::Timespec;

use super::*;

fn connected(kind: Kind, needs_client: bool) -> (Channel, UnixStream) {
    let (guest, host) = UnixStream::pair().unwrap();
    let mut channel = Channel::new(kind, 7, needs_client);
    channel.connect(host).unwrap();
    (channel, guest)
}

fn client(channel: &mut Channel) -> UnixStream {
    let (client, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    channel.attach(server, Vec::new());
    client
}

/// What a poll finds of what the channel waits for.
fn polled(channel: &Channel, timeout: Option<&Timespec>) -> Ready {
    let mut interests = Vec::new();
    channel.interests(&mut interests);
    Ready::wait(interests, timeout).unwrap()
}

fn turns(channel: &mut Channel) {
    let mut buffer = [0; PIECE];
    for _ in 0..8 {
        let ready = Ready::everything();
        channel.turn(&ready, &mut buffer, None).unwrap();
    }
}

#[test]
fn a_client_that_comes_after_the_end_sees_the_end() {
    let (mut channel, guest) = connected(Kind::Stderr, true);
    drop(guest);
    channel.end();
    let mut late = client(&mut channel);
    assert_eq!(late.read(&mut [0; 8]).unwrap(), 0);
    assert!(channel.is_complete() && channel.is_over());
}

#[test]
fn output_waits_for_its_client_and_ends_with_the_process() {
    let (mut channel, mut guest) = connected(Kind::Stdout, true);
    guest.write_all(b"early").unwrap();
    turns(&mut channel);
    assert!(channel.is_complete(), "nobody reads: nobody waits");
    let mut reader = client(&mut channel);
    turns(&mut channel);
    assert!(!channel.is_complete());
    drop(guest);
    turns(&mut channel);
    assert!(channel.is_complete() && channel.is_over());
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "early");
}

#[test]
fn a_slow_client_holds_one_piece_and_the_guest_back() {
    let (mut channel, guest) = connected(Kind::Stdout, true);
    let _slow = client(&mut channel);
    guest.set_nonblocking(true).unwrap();
    let mut sent = 0;
    for _ in 0..1000 {
        sent += (&guest).write(&[0; 4096]).unwrap_or(0);
        turns(&mut channel);
    }
    assert!(channel.clients[0].out.len() <= PIECE);
    assert!(sent < 4 << 20, "{sent} bytes were taken from the guest");
}

#[test]
fn bytes_keep_their_order_whatever_each_side_takes_at_a_time() {
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
    let (mut channel, guest) = connected(Kind::Port, true);
    let there = client(&mut channel);
    let write = |mut side: &UnixStream, bytes: &[u8]| side.write_all(bytes).unwrap();
    let (to_guest, to_client) = (there.try_clone().unwrap(), guest.try_clone().unwrap());
    let (first, second) = (bytes.clone(), bytes.clone());
    let writers = [
        std::thread::spawn(move || {
            write(&to_guest, &first);
            to_guest.shutdown(Shutdown::Write).unwrap();
        }),
        std::thread::spawn(move || {
            write(&to_client, &second);
            to_client.shutdown(Shutdown::Write).unwrap();
        }),
    ];
    let readers = [there, guest].map(|mut side| {
        std::thread::spawn(move || {
            let mut received = Vec::new();
            // Less at a time than is written.
            let mut piece = [0; 7919];
            loop {
                match side.read(&mut piece).unwrap() {
                    0 => return received,
                    length => received.extend_from_slice(&piece[..length]),
                }
            }
        })
    });
    let mut buffer = [0; PIECE];
    while !channel.is_over() {
        let ready = polled(&channel, None);
        channel.turn(&ready, &mut buffer, None).unwrap();
    }
    drop(channel);
    for writer in writers {
        writer.join().unwrap();
    }
    for reader in readers {
        assert!(reader.join().unwrap() == bytes);
    }
}

#[test]
fn a_port_has_an_end_each_way() {
    let (mut channel, mut guest) = connected(Kind::Port, true);
    let mut there = client(&mut channel);
    guest.write_all(b"all").unwrap();
    guest.shutdown(Shutdown::Write).unwrap();
    turns(&mut channel);
    let mut text = String::new();
    there.read_to_string(&mut text).unwrap();
    assert_eq!(text, "all");
    there.write_all(b"still").unwrap();
    turns(&mut channel);
    let mut bytes = [0; 5];
    guest.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"still");
    assert!(!channel.is_over());
    there.shutdown(Shutdown::Write).unwrap();
    turns(&mut channel);
    assert!(channel.is_over());
    drop(channel);
    assert_eq!(guest.read(&mut bytes).unwrap(), 0);
    // A guest that has gone altogether takes nothing, which is found when something is sent.
    let (mut channel, guest) = connected(Kind::Port, true);
    let mut there = client(&mut channel);
    drop(guest);
    turns(&mut channel);
    there.write_all(b"nobody").unwrap();
    turns(&mut channel);
    assert!(channel.is_over());
}

#[test]
fn the_end_of_input_closes_the_guests() {
    let (mut channel, mut guest) = connected(Kind::Stdin, true);
    let mut writer = client(&mut channel);
    writer.write_all(b"typed").unwrap();
    writer.shutdown(Shutdown::Write).unwrap();
    turns(&mut channel);
    let mut text = String::new();
    guest.read_to_string(&mut text).unwrap();
    assert_eq!(text, "typed");
}

#[test]
fn a_shared_input_outlives_its_clients_and_ends_with_its_reader() {
    let (mut channel, mut guest) = connected(Kind::SharedStdin, false);
    for word in [b"one", b"two"] {
        let mut writer = client(&mut channel);
        writer.write_all(word).unwrap();
        drop(writer);
        turns(&mut channel);
        let mut read = [0; 3];
        guest.read_exact(&mut read).unwrap();
        assert_eq!(&read, word);
        assert!(!channel.has_client() && !channel.is_over());
    }
    drop(guest);
    let mut writer = client(&mut channel);
    writer.write_all(b"more").unwrap();
    turns(&mut channel);
    assert!(channel.is_over());
}

#[test]
fn an_input_that_ended_before_the_guest_came_ends_then() {
    let mut channel = Channel::new(Kind::Stdin, 7, true);
    let writer = client(&mut channel);
    drop(writer);
    turns(&mut channel);
    let (mut guest, host) = UnixStream::pair().unwrap();
    channel.connect(host).unwrap();
    let ready = polled(&channel, None);
    channel.turn(&ready, &mut [0; PIECE], None).unwrap();
    assert_eq!(guest.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_port_whose_client_has_said_all_does_not_keep_the_loop_awake() {
    let (mut channel, _guest) = connected(Kind::Port, true);
    let writer = client(&mut channel);
    writer.shutdown(Shutdown::Write).unwrap();
    turns(&mut channel);
    let now = Timespec::default();
    assert!(polled(&channel, Some(&now)).is_empty());
}

#[test]
fn what_is_not_ready_is_not_read() {
    let (mut channel, mut guest) = connected(Kind::Stdout, true);
    let mut reader = client(&mut channel);
    guest.write_all(b"x").unwrap();
    let mut buffer = [0; PIECE];
    let nothing = Ready::default();
    assert!(!channel.turn(&nothing, &mut buffer, None).unwrap());
    let ready = polled(&channel, None);
    assert!(channel.turn(&ready, &mut buffer, None).unwrap());
    let mut byte = [0];
    reader.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"x");
}

#[test]
fn a_terminal_goes_both_ways_and_outlives_its_clients() {
    let (mut channel, mut guest) = connected(Kind::Tty, false);
    let mut first = client(&mut channel);
    first.write_all(b"keys").unwrap();
    turns(&mut channel);
    let mut keys = [0; 4];
    guest.read_exact(&mut keys).unwrap();
    drop(first);
    guest.write_all(b"lost").unwrap();
    turns(&mut channel);
    let mut second = client(&mut channel);
    guest.write_all(b"seen").unwrap();
    turns(&mut channel);
    let mut seen = [0; 4];
    second.read_exact(&mut seen).unwrap();
    assert_eq!((&keys, &seen), (b"keys", b"seen"));
}

/// What the device finds, and the client's end that it would write to.
fn passed_on(guest: &UnixStream) -> (Vec<u8>, Option<passing::PassedOn>) {
    let mut said = [0; 64];
    match passing::receive(guest, &mut said) {
        Ok((length, passed)) => (said[..length].to_vec(), passed),
        Err(_) => (Vec::new(), None),
    }
}

#[test]
fn a_stream_for_one_client_is_passed_on_when_nothing_of_it_is_here() {
    let (guest, host) = UnixStream::pair().unwrap();
    let mut channel = Channel::for_one_client(Kind::Stdin, 7);
    channel.connect(host).unwrap();
    channel.pass_on();
    assert!(!channel.has_client());
    let (mut client, server) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    channel.attach(server, b"first".to_vec());
    channel.pass_on();
    assert!(
        passed_on(&guest).1.is_none(),
        "the guest has not had the first bytes"
    );
    turns(&mut channel);
    channel.pass_on();
    let (said, passed) = passed_on(&guest);
    assert_eq!(said, b"first");
    client.write_all(b"more").unwrap();
    turns_when_polled(&mut channel);
    let mut more = [0; 4];
    let passed = passed.expect("it is passed on");
    (&passed.client).read_exact(&mut more).unwrap();
    assert_eq!((&more, passed.until), (b"more", Until::BothEnds));
    assert!(channel.has_client() && !channel.is_over());
    drop((guest, passed));
    turns_when_polled(&mut channel);
    assert!(channel.is_over());
    assert_eq!(client.read(&mut [0; 8]).unwrap(), 0);
}

/// One turn with what a poll finds now.
fn turns_when_polled(channel: &mut Channel) {
    let ready = polled(channel, Some(&Timespec::default()));
    channel.turn(&ready, &mut [0; PIECE], None).unwrap();
}

#[test]
fn an_output_that_is_passed_on_is_complete_at_its_hang_up() {
    let (mut guest, host) = UnixStream::pair().unwrap();
    let mut channel = Channel::for_one_client(Kind::Stdout, 7);
    channel.connect(host).unwrap();
    guest.write_all(b"output").unwrap();
    let reader = client(&mut channel);
    channel.pass_on();
    let passed = passed_on(&guest).1.expect("it is passed on");
    assert_eq!(passed.until, Until::OutputEnds);
    let mut unread = [0; 6];
    (&passed.unread).read_exact(&mut unread).unwrap();
    assert_eq!(&unread, b"output");
    turns_when_polled(&mut channel);
    assert!(!channel.is_complete());
    drop((guest, passed));
    turns_when_polled(&mut channel);
    assert!(channel.is_complete() && channel.is_over());
    drop(reader);
}

#[test]
fn what_others_may_attach_to_is_not_passed_on() {
    for (mut channel, guest) in [
        connected(Kind::Stdout, true),
        connected(Kind::Tty, true),
        connected(Kind::SharedStdin, true),
    ] {
        let _client = client(&mut channel);
        channel.pass_on();
        assert!(passed_on(&guest).1.is_none());
    }
    for kind in [Kind::Tty, Kind::File] {
        let (guest, host) = UnixStream::pair().unwrap();
        let mut channel = Channel::for_one_client(kind, 7);
        channel.connect(host).unwrap();
        let _client = client(&mut channel);
        channel.pass_on();
        assert!(passed_on(&guest).1.is_none());
    }
}
