//! The pod API's requests: any bytes, in any pieces, are requests, a refusal, or a wait for more; and any body
//! is a value or a refusal.
#![no_main]

use cube::pod::api::body::{CreateContainer, CreateExec, Kill, Stop};
use cube::pod::api::http::{MAX_BODY, MAX_HEAD, Parser};
use cube::pod::api::volume_body::{CreateVolume, PutFiles};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, &[u8])| {
    let (step, bytes) = input;
    let mut parser = Parser::default();
    for piece in bytes.chunks(usize::from(step).max(1)) {
        parser.push(piece);
        loop {
            match parser.take() {
                Ok(Some(request)) => {
                    assert!(request.body.len() <= MAX_BODY && request.path.len() <= MAX_HEAD);
                    let _ = request.json::<CreateContainer>();
                    let _ = request.json::<CreateExec>();
                    let _ = request.json::<Kill>();
                    let _ = request.json::<Stop>();
                    let _ = request.json::<CreateVolume>();
                    if let Ok(set) = request.json::<PutFiles>() {
                        // What may be a Secret is not shown.
                        let shown = format!("{set:?}");
                        assert!(shown.len() <= 256 + 4 * bytes.len());
                    }
                    let _ = (request.text("path"), request.number("tail"), request.switch("follow"));
                }
                Ok(None) => break,
                // The connection is closed.
                Err(_) => return,
            }
        }
    }
});
