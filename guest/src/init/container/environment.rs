//! The environment of a container's first process.
#![forbid(unsafe_code)]

/// Docker's default.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The environment asked for, and what a program may rely on if it was not asked for: `PATH`, `HOME`,
/// `HOSTNAME` and, on a terminal, `TERM`.
pub(crate) fn complete(
    asked: &[String],
    home: &[u8],
    hostname: &[u8],
    terminal: bool,
) -> Vec<Vec<u8>> {
    let mut env: Vec<Vec<u8>> = asked
        .iter()
        .map(|entry| entry.clone().into_bytes())
        .collect();
    let mut default = |name: &str, value: &[u8]| {
        if value_of(asked, name).is_none() && !value.is_empty() {
            env.push([name.as_bytes(), b"=", value].concat());
        }
    };
    default("PATH", DEFAULT_PATH.as_bytes());
    default("HOME", home);
    default("HOSTNAME", hostname);
    if terminal {
        default("TERM", b"xterm");
    }
    env
}

/// The `PATH` to look programs up in.
pub(crate) fn path(asked: &[String]) -> &str {
    value_of(asked, "PATH").unwrap_or(DEFAULT_PATH)
}

/// The first entry counts, as for getenv(3).
fn value_of<'a>(env: &'a [String], name: &str) -> Option<&'a str> {
    env.iter()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(env: &[&str], terminal: bool) -> Vec<String> {
        let asked: Vec<String> = env.iter().map(|entry| (*entry).to_owned()).collect();
        complete(&asked, b"/home/u", b"pod", terminal)
            .into_iter()
            .map(|entry| String::from_utf8(entry).unwrap())
            .collect()
    }

    #[test]
    fn what_is_missing_is_added() {
        let path = format!("PATH={DEFAULT_PATH}");
        assert_eq!(
            lines(&["A=1"], true),
            ["A=1", &*path, "HOME=/home/u", "HOSTNAME=pod", "TERM=xterm"]
        );
        assert_eq!(lines(&[], false), [&*path, "HOME=/home/u", "HOSTNAME=pod"]);
    }

    #[test]
    fn what_was_asked_for_stays() {
        let asked = ["PATH=", "HOME=/h", "HOSTNAME=h", "TERM=vt100"];
        assert_eq!(lines(&asked, true), asked);
    }

    #[test]
    fn the_first_path_counts_and_names_are_whole() {
        let env = ["XPATH=/no", "PATHX=/no", "PATH=/a", "PATH=/b"].map(str::to_owned);
        assert_eq!(path(&env), "/a");
        assert_eq!(path(&env[..2]), DEFAULT_PATH);
    }
}
