#![forbid(unsafe_code)]

use proptest::prelude::*;

use super::*;

const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
    # a comment\n\
    broken:x:12\n\
    www:x:33:33::/var/www:/bin/false\n\
    1000:x:7:8::/seven:/bin/sh\n\
    nohome:x:50:51\n\
    app:x:1000:1001:App,,,:/app:/bin/sh";
const GROUP: &[u8] =
    b"root:x:0:\nadm:x:4:app,www\nwww:x:33:\nbroken:x\ntape:x:26:root,app\nlast:x:99:xapp,app";

fn identity(uid: u32, gid: u32, groups: &[u32], home: &str) -> Identity {
    Identity {
        uid,
        gid,
        groups: groups.to_vec(),
        home: home.as_bytes().to_vec(),
    }
}

#[test]
fn users_resolve_as_docker_resolves_them() {
    for (asked, expected) in [
        ("", identity(0, 0, &[26], "/root")),
        ("root", identity(0, 0, &[26], "/root")),
        ("0", identity(0, 0, &[26], "/root")),
        ("app", identity(1000, 1001, &[4, 26, 99], "/app")),
        ("www", identity(33, 33, &[4], "/var/www")),
        ("33", identity(33, 33, &[4], "/var/www")),
        ("app:", identity(1000, 1001, &[4, 26, 99], "/app")),
        ("app:adm", identity(1000, 4, &[], "/app")),
        ("app:26", identity(1000, 26, &[], "/app")),
        ("app:12345", identity(1000, 12345, &[], "/app")),
        ("4242", identity(4242, 0, &[], "/")),
        ("4242:adm", identity(4242, 4, &[], "/")),
        (":adm", identity(0, 4, &[], "/root")),
        ("1000", identity(7, 8, &[], "/seven")),
        ("nohome", identity(50, 51, &[], "/")),
        ("2147483647", identity(2_147_483_647, 0, &[], "/")),
    ] {
        assert_eq!(resolve(asked, PASSWD, GROUP), Ok(expected), "{asked}");
    }
}

#[test]
fn what_does_not_resolve_says_why() {
    for (asked, expected) in [
        ("nobody", UserError::NoUser("nobody".into())),
        ("broken", UserError::NoUser("broken".into())),
        ("-1", UserError::NoUser("-1".into())),
        ("+5", UserError::NoUser("+5".into())),
        ("app:wheel", UserError::NoGroup("wheel".into())),
        ("app:broken", UserError::NoGroup("broken".into())),
        ("2147483648", UserError::TooLarge("2147483648".into())),
        (
            "99999999999999",
            UserError::TooLarge("99999999999999".into()),
        ),
        ("0:2147483648", UserError::TooLarge("2147483648".into())),
    ] {
        assert_eq!(resolve(asked, PASSWD, GROUP), Err(expected), "{asked}");
    }
}

#[test]
fn an_image_without_the_files_has_root_and_numbers() {
    assert_eq!(resolve("", b"", b""), Ok(identity(0, 0, &[], "/")));
    assert_eq!(resolve("12:13", b"", b""), Ok(identity(12, 13, &[], "/")));
    assert!(resolve("root", b"", b"").is_err());
}

proptest! {
    #[test]
    fn no_bytes_make_it_fail_otherwise(
        asked in "[a-z0-9:]{0,12}",
        passwd in prop::collection::vec(any::<u8>(), 0..300),
        group in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        if let Ok(identity) = resolve(&asked, &passwd, &group) {
            prop_assert!(identity.uid <= MAX_ID && identity.gid <= MAX_ID);
        }
    }

    #[test]
    fn an_entry_is_found_among_noise(
        name in "[a-z]{1,8}",
        uid in 0..=MAX_ID,
        gid in 0..=MAX_ID,
        noise in prop::collection::vec("[A-Z0-9:,]{0,30}", 0..20),
        at in any::<prop::sample::Index>(),
    ) {
        let mut lines = noise;
        lines.insert(at.index(lines.len() + 1), format!("{name}:x:{uid}:{gid}:c:/h:/s"));
        let found = resolve(&name, lines.join("\n").as_bytes(), b"").unwrap();
        prop_assert_eq!(found, identity(uid, gid, &[], "/h"));
    }
}
