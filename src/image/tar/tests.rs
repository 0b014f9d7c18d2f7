//! Numbers and records; whole archives are in `tests/image`.

use proptest::prelude::*;

use super::header::number;
use super::*;

#[test]
fn numbers_are_octal_or_base_256() {
    assert_eq!(number(b"0000644\0"), Ok(0o644));
    assert_eq!(number(b"   644 \0"), Ok(0o644));
    assert_eq!(number(b"\0\0\0\0"), Ok(0));
    assert_eq!(number(b"77777777777"), Ok(0o77_777_777_777));
    assert_eq!(number(b"\x80\0\0\0\0\0\0\x03\0\0\0\0"), Ok(3 << 32));
    assert_eq!(number(&[0xff; 12]), Ok(-1));
    assert!(number(b"0000648\0").is_err());
    assert!(number(b"\x8f\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff").is_err());
}

fn extensions(bytes: &[u8]) -> Result<Extensions, &'static str> {
    let mut extensions = Extensions::default();
    extensions.parse(bytes).map(|()| extensions)
}

#[test]
fn records_are_parsed_and_later_ones_win() {
    let parsed =
        extensions(b"9 path=a\n10 path=bc\n12 uid=4000\n6 gid=\n19 SCHILY.xattr.u=\n").unwrap_err();
    assert!(parsed.contains("PAX record"), "{parsed}");
    let parsed = extensions(b"9 path=a\n11 path=bc\n12 uid=4000\n7 gid=\n18 SCHILY.xattr.u=\n");
    // The last length is wrong by one: 18 bytes would need a newline there.
    assert!(parsed.is_err());
    let parsed =
        extensions(b"9 path=a\n11 path=bc\n12 uid=4000\n7 gid=\n19 SCHILY.xattr.u=\n").unwrap();
    assert_eq!(parsed.path.as_deref(), Some(&b"bc"[..]));
    assert_eq!((parsed.uid, parsed.gid), (Some(4000), None));
    assert_eq!(parsed.xattrs.get(&b"u"[..]), Some(&Vec::new()));
}

#[test]
fn times_have_fractions_and_signs() {
    let time = |text: &str| extensions(format!("{} mtime={text}\n", text.len() + 10).as_bytes());
    assert_eq!(
        time("1700000000.25").unwrap().mtime,
        Some((1_700_000_000, 250_000_000))
    );
    assert_eq!(
        time("12345.1234567891").unwrap().mtime,
        Some((12345, 123_456_789))
    );
    assert_eq!(time("-1.2500000").unwrap().mtime, Some((-2, 750_000_000)));
    assert_eq!(time("-100000000").unwrap().mtime, Some((-100_000_000, 0)));
    assert!(time("1e99999999").is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let mut reader = TarReader::new(Stream(&bytes[..]));
        while let Ok(Some(_)) = reader.next_entry() {}
    }

    #[test]
    fn no_records_make_the_parser_panic(text in "([0-9]{1,3} (path|size|mtime|GNU.sparse.(map|offset|numbytes|major)|SCHILY.xattr.a)=[-0-9.,a]{0,9}\n?){0,6}") {
        let _result = extensions(text.as_bytes());
    }

    #[test]
    fn display_is_short_and_has_no_control_characters(name in prop::collection::vec(any::<u8>(), 0..5000)) {
        let shown = display(&name);
        prop_assert!(shown.len() < 400);
        prop_assert!(!shown.chars().any(char::is_control));
    }
}
