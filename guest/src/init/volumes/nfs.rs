//! NFS: mounted by the kernel's own client, in the pod's network.
//!
//! The kernel takes an address. A name would need a resolver here, for one field: the host, which knows
//! the pod's name servers, has one.
#![forbid(unsafe_code)]

use std::ffi::CString;
use std::net::IpAddr;

use rustix::mount::MountFlags;

use crate::error::{Context, Error};

/// A directory of a server, ready to be mounted.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Export {
    /// `server:/path`.
    source: String,
    kind: &'static str,
    options: CString,
    read_only: bool,
    target: String,
}

impl Export {
    /// Checks what was asked for and completes the options as mount.nfs(8) does: the address, a version (4.2
    /// unless one is asked for), and for version 3 no locks, because no lock daemon runs.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub(crate) fn new(
        server: &str,
        path: &str,
        options: &str,
        read_only: bool,
    ) -> Result<Self, Error> {
        let bracketless = server.trim_start_matches('[').trim_end_matches(']');
        let address: IpAddr = bracketless.parse().map_err(|_| {
            Error::Refused(format!(
                "the NFS server `{}` is not an address: the guest resolves no names",
                server.escape_debug()
            ))
        })?;
        if !path.starts_with('/') || path.contains('\0') {
            return Err(Error::Refused(format!(
                "the NFS path `{}` is not absolute",
                path.escape_debug()
            )));
        }
        let mut all: Vec<&str> = options.split(',').filter(|o| !o.is_empty()).collect();
        if all.iter().any(|option| option.starts_with("addr=")) {
            return Err(Error::Refused(
                "the NFS option `addr` is the server's and cannot be given".into(),
            ));
        }
        let version = |option: &&str| {
            let value = ["vers=", "nfsvers="]
                .iter()
                .find_map(|p| option.strip_prefix(p));
            value.map(str::to_owned)
        };
        let asked = all.iter().find_map(version);
        if asked.is_none() {
            all.push("vers=4.2");
        }
        let is_3 = asked.is_some_and(|version| version.starts_with('3'));
        if is_3
            && !all
                .iter()
                .any(|option| matches!(*option, "lock" | "nolock"))
        {
            all.push("nolock");
        }
        let options = format!("{},addr={address}", all.join(","));
        let options = CString::new(options)
            .map_err(|_| Error::Refused("the NFS options contain a NUL byte".into()))?;
        let host = match address {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        };
        Ok(Self {
            source: format!("{host}:{path}"),
            kind: if is_3 { "nfs" } else { "nfs4" },
            options,
            read_only,
            target: String::new(),
        })
    }

    /// To be mounted at `target`.
    pub(crate) fn at(mut self, target: &str) -> Self {
        target.clone_into(&mut self.target);
        self
    }

    /// Mounts it. Waits for the server.
    ///
    /// # Errors
    /// The server's or the kernel's refusal.
    pub(crate) fn mount(&self) -> Result<(), Error> {
        let mut flags = MountFlags::NODEV | MountFlags::NOSUID;
        flags.set(MountFlags::RDONLY, self.read_only);
        rustix::mount::mount(
            &*self.source,
            &*self.target,
            self.kind,
            flags,
            &*self.options,
        )
        .context(|| format!("mount {} by NFS", self.source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(server: &str, asked: &str) -> String {
        let export = Export::new(server, "/data", asked, false).unwrap();
        let options = export.options.into_string().unwrap();
        format!("{} {} {options}", export.kind, export.source)
    }

    #[test]
    fn address_and_version_are_added() {
        let expected = "nfs4 10.0.0.1:/data vers=4.2,addr=10.0.0.1";
        assert_eq!(options("10.0.0.1", ""), expected);
        let expected = "nfs4 [fd00::1]:/data hard,vers=4.1,addr=fd00::1";
        assert_eq!(options("[fd00::1]", "hard,vers=4.1"), expected);
        let expected = "nfs 10.0.0.1:/data nfsvers=3,nolock,addr=10.0.0.1";
        assert_eq!(options("10.0.0.1", "nfsvers=3"), expected);
    }

    #[test]
    fn what_the_kernel_would_misunderstand_is_refused() {
        let refused = |server: &str, path: &str, options: &str| {
            Export::new(server, path, options, false)
                .unwrap_err()
                .to_string()
        };
        assert!(refused("files.example", "/", "").contains("resolves no names"));
        assert!(refused("10.0.0.1", "data", "").contains("not absolute"));
        assert!(refused("10.0.0.1", "/", "addr=10.0.0.2").contains("`addr`"));
    }
}
