//! Resource limits of a process, setrlimit(2).
#![forbid(unsafe_code)]

use cube_guest::Rlimit;
use rustix::process::Resource;

use crate::error::{Context, Error};

/// Open files of a container's processes unless the specification says otherwise: systemd's and so
/// containerd's default.
const OPEN_FILES: rustix::process::Rlimit = rustix::process::Rlimit {
    current: Some(1024),
    maximum: Some(524_288),
};

const NAMES: [(&str, Resource); 16] = [
    ("RLIMIT_AS", Resource::As),
    ("RLIMIT_CORE", Resource::Core),
    ("RLIMIT_CPU", Resource::Cpu),
    ("RLIMIT_DATA", Resource::Data),
    ("RLIMIT_FSIZE", Resource::Fsize),
    ("RLIMIT_LOCKS", Resource::Locks),
    ("RLIMIT_MEMLOCK", Resource::Memlock),
    ("RLIMIT_MSGQUEUE", Resource::Msgqueue),
    ("RLIMIT_NICE", Resource::Nice),
    ("RLIMIT_NOFILE", Resource::Nofile),
    ("RLIMIT_NPROC", Resource::Nproc),
    ("RLIMIT_RSS", Resource::Rss),
    ("RLIMIT_RTPRIO", Resource::Rtprio),
    ("RLIMIT_RTTIME", Resource::Rttime),
    ("RLIMIT_SIGPENDING", Resource::Sigpending),
    ("RLIMIT_STACK", Resource::Stack),
];

/// Sets the calling process's limits. Needs CAP_SYS_RESOURCE.
///
/// # Errors
/// A limit that does not exist, or that the kernel does not take.
pub(crate) fn set(limits: &[Rlimit]) -> Result<(), Error> {
    rustix::process::setrlimit(Resource::Nofile, OPEN_FILES)
        .context(|| "set the limit of open files".into())?;
    for limit in limits {
        let resource = named(&limit.name)?;
        let bound = |value: u64| (value != u64::MAX).then_some(value);
        let wanted = rustix::process::Rlimit {
            current: bound(limit.soft),
            maximum: bound(limit.hard),
        };
        rustix::process::setrlimit(resource, wanted)
            .context(|| format!("set {} to {} and {}", limit.name, limit.soft, limit.hard))?;
    }
    Ok(())
}

fn named(name: &str) -> Result<Resource, Error> {
    let found = NAMES.iter().find(|(known, _)| *known == name);
    found.map(|(_, resource)| *resource).ok_or_else(|| {
        Error::Refused(format!(
            "no resource limit is called `{}`",
            name.escape_debug()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_limit_has_its_own_number_and_others_are_refused() {
        let mut numbers: Vec<u32> = NAMES.iter().map(|(_, resource)| *resource as u32).collect();
        numbers.sort_unstable();
        assert!(numbers.into_iter().eq(0..16));
        assert!(named("RLIMIT_NOFILE").is_ok());
        assert!(
            named("NOFILE")
                .unwrap_err()
                .to_string()
                .contains("`NOFILE`")
        );
    }
}
