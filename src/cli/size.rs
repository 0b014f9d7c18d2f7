//! Sizes as people write them: `128M`, `1G`, `64MiB`.
#![forbid(unsafe_code)]

/// Bytes in a MiB.
pub(crate) const MIB: u64 = 1 << 20;

/// A size that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum SizeError {
    /// Not a number and a unit.
    #[error("`{0}` is not a size: write a whole number and a unit, such as 128M, 64MiB or 1G")]
    Malformed(String),
    /// More than 64 bits of bytes.
    #[error("`{0}` is more than any machine has")]
    TooLarge(String),
    /// Memory comes in MiB.
    #[error("`{0}` is not a whole number of MiB")]
    Fraction(String),
    /// Zero.
    #[error("a machine needs memory: `{0}` is none")]
    Zero(String),
    /// More than the host has.
    #[error("`{given}` is more than the {host_mib} MiB of this host")]
    BeyondHost {
        /// What was asked for.
        given: String,
        /// What the host has.
        host_mib: u64,
    },
}

/// The shift that a unit stands for. All units are powers of 1,024, whichever way they are written.
fn shift(unit: &str) -> Option<u32> {
    let unit = unit.to_ascii_lowercase();
    let prefix = match unit.strip_suffix("ib").or_else(|| unit.strip_suffix('b')) {
        Some("") if unit == "ib" => return None,
        Some(prefix) => prefix,
        None => &unit,
    };
    match prefix {
        "" => Some(0),
        "k" => Some(10),
        "m" => Some(20),
        "g" => Some(30),
        "t" => Some(40),
        _ => None,
    }
}

/// Reads a size in bytes.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, SizeError> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let malformed = || SizeError::Malformed(text.to_owned());
    let shift = shift(unit.trim())
        .filter(|_| digits > 0)
        .ok_or_else(malformed)?;
    number
        .parse::<u64>()
        .ok()
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| SizeError::TooLarge(text.to_owned()))
}

/// Reads the memory of a machine, in MiB.
pub(crate) fn parse_memory(text: &str) -> Result<u32, SizeError> {
    memory_within(text, host_mib())
}

fn host_mib() -> u64 {
    let info = rustix::system::sysinfo();
    info.totalram.saturating_mul(u64::from(info.mem_unit)) / MIB
}

fn memory_within(text: &str, host_mib: u64) -> Result<u32, SizeError> {
    let bytes = parse_bytes(text)?;
    let given = || text.trim().to_owned();
    if bytes == 0 {
        return Err(SizeError::Zero(given()));
    }
    if !bytes.is_multiple_of(MIB) {
        return Err(SizeError::Fraction(given()));
    }
    if bytes / MIB > host_mib {
        let given = given();
        return Err(SizeError::BeyondHost { given, host_mib });
    }
    u32::try_from(bytes / MIB).map_err(|_| SizeError::TooLarge(given()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_read_the_way_they_are_written() {
        let cases = [
            ("0", 0),
            ("17", 17),
            ("17b", 17),
            ("1k", 1 << 10),
            ("128M", 128 << 20),
            ("128m", 128 << 20),
            ("64MiB", 64 << 20),
            ("64 MB", 64 << 20),
            (" 1G ", 1 << 30),
            ("2TiB", 2 << 40),
        ];
        for (text, bytes) in cases {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused_with_its_text() {
        for text in [
            "", "M", "1X", "-1", "+1", "1.5G", "1e3", "0x10", "1iB", "1 2", "١M",
        ] {
            let sentence = parse_bytes(text).unwrap_err().to_string();
            assert!(sentence.contains(&format!("`{text}`")), "{sentence}");
        }
        for text in ["18446744073709551616", "16777216T", "99999999999999999999G"] {
            assert_eq!(parse_bytes(text), Err(SizeError::TooLarge(text.to_owned())));
        }
    }

    #[test]
    fn memory_is_whole_mib_that_the_host_has() {
        let cases = [
            ("0", "needs memory"),
            ("0G", "needs memory"),
            ("1000k", "whole number of MiB"),
            ("9G", "8192 MiB of this host"),
        ];
        for (text, fault) in cases {
            let sentence = memory_within(text, 8192).unwrap_err().to_string();
            assert!(sentence.contains(fault), "{text}: {sentence}");
        }
        assert_eq!(memory_within("8G", 8192), Ok(8192));
        assert!(parse_memory("1M").is_ok(), "this host has a MiB");
    }

    proptest! {
        #[test]
        fn every_number_and_unit_multiplies_out(number in 0_u64..1 << 20, unit in 0_usize..5, form in 0_usize..3) {
            let letter = ["", "k", "M", "G", "T"][unit];
            let suffix = if letter.is_empty() { "" } else { ["", "B", "iB"][form] };
            let bytes = number << (10 * unit);
            prop_assert_eq!(parse_bytes(&format!("{number}{letter}{suffix}")), Ok(bytes));
        }

        #[test]
        fn any_text_is_a_size_or_an_error(text in ".{0,30}") {
            let _ = memory_within(&text, 1024);
        }
    }
}
