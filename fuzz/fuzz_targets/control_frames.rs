//! Control frames of either direction, in pieces of any size: a message, an error or a wait for more; what
//! was taken says the same when it is sent again, and no more is kept than an unfinished frame.
#![no_main]

use cube_guest::files::FileSet;
use cube_guest::frame::{Decoder, MAX_FRAME, encode, read};
use cube_guest::{GuestMessage, HostMessage};
use libfuzzer_sys::fuzz_target;
use serde::Serialize;
use serde::de::DeserializeOwned;

fuzz_target!(|input: &[u8]| {
    let Some((how, bytes)) = input.split_first() else {
        return;
    };
    let size = usize::from(how >> 2) + 1;
    match how & 3 {
        0 => stream::<HostMessage>(bytes, size),
        1 => stream::<GuestMessage>(bytes, size),
        2 => stream::<FileSet>(bytes, size),
        // The mutator finds JSON sooner than lengths.
        _ => {
            let length = u32::try_from(bytes.len()).unwrap_or(MAX_FRAME + 1);
            let frame = [&length.to_le_bytes(), bytes].concat();
            stream::<HostMessage>(&frame, size);
            stream::<GuestMessage>(&frame, size);
            stream::<FileSet>(&frame, size);
        }
    }
});

fn stream<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(
    bytes: &[u8],
    size: usize,
) {
    let mut decoder = Decoder::default();
    let mut taken = Vec::new();
    for piece in bytes.chunks(size) {
        decoder.push(piece);
        loop {
            match decoder.take::<T>() {
                Ok(Some(message)) => taken.push(message),
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    let mut whole = bytes;
    for message in taken {
        let again = encode(&message).expect("what came in a frame fits one");
        let mut again = &again[..];
        assert_eq!(read::<T>(&mut again).unwrap().as_ref(), Some(&message));
        assert_eq!(read::<T>(&mut whole).unwrap(), Some(message));
    }
    assert_eq!(decoder.is_empty(), whole.is_empty());
}
