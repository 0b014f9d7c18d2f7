//! The outer machine's kernel and initramfs: Debian's kernel package unpacked, not installed; busybox, the modules and
//! `tests/testbed/init`. Cached by what went in.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::qemu::Qemu;
use crate::cache::{Cache, Key};
use crate::error::{Doing, Error, Result};
use crate::{apt, binaries, run};

/// Inserted by init, after what they depend on: what the machine needs before it has its root, and `/dev/kvm`.
const EAGER: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "overlay",
    "kvm_amd",
    "tun",
];

/// There for the kernel to load when something asks for them: networks, netfilter, file systems, block devices.
const LAZY: &str = "veth bridge dummy macvlan macvtap vxlan ifb vhost_net act_mirred act_gact sch_ingress sch_htb \
    sch_fq_codel sch_tbf cls_u32 cls_matchall cls_flower nf_tables nft_chain_nat nft_compat nft_masq nft_nat nft_ct \
    nft_log nft_limit nft_reject_inet nft_fib_inet xt_comment xt_MASQUERADE xt_conntrack xt_mark xt_addrtype xt_nat \
    xt_tcpudp xt_multiport xt_statistic iptable_nat iptable_filter ip6table_nat ip6table_filter br_netfilter nfsd \
    nfsv3 nfsv4 nfs loop nbd ext4 erofs fuse dm_mod configfs inet_diag tcp_diag unix_diag vsock vsock_diag \
    vhost_vsock null_blk crc32c_generic";

/// QEMU, and the files that it boots.
#[derive(Debug, Clone)]
pub(crate) struct Outer {
    /// The emulator.
    pub(crate) qemu: Qemu,
    /// Debian's kernel.
    pub(crate) kernel: PathBuf,
    /// Our initramfs.
    pub(crate) initramfs: PathBuf,
}

impl Outer {
    /// The outer machine's files, and whether they were in the cache.
    pub(crate) fn find_or_make(cache: &Cache) -> Result<(Self, bool)> {
        let package = apt::dependency("linux-image-amd64", "linux-image-")?;
        let init_path = binaries::root().join("tests/testbed/init");
        let init = fs::read(&init_path).doing("read", &init_path)?;
        let version = apt::version(&package)?;
        let key = Key::of(&[
            ("init", &init),
            ("eager", EAGER.join(" ").as_bytes()),
            ("lazy", LAZY.as_bytes()),
            ("package", format!("{package} {version}").as_bytes()),
        ]);
        let found = cache.entry("testbed", &key, |directory| {
            make(&package, &init, directory)
        })?;
        let (qemu, had_qemu) = Qemu::find_or_make(cache)?;
        let outer = Self {
            qemu,
            kernel: found.directory.join("vmlinuz"),
            initramfs: found.directory.join("initramfs"),
        };
        Ok((outer, found.cached && had_qemu))
    }
}

fn make(package: &str, init: &[u8], directory: &Path) -> Result<()> {
    let scratch = directory.join("scratch");
    let (unpacked, tree) = (scratch.join("unpacked"), scratch.join("tree"));
    for path in [&unpacked, &tree] {
        fs::create_dir_all(path).doing("create", path)?;
    }
    apt::unpack(&[package], &scratch, &unpacked)?;
    let version = only_entry(&unpacked.join("lib/modules"))?;
    depmod(&unpacked, &version)?;
    install_init(init, &tree)?;
    install_modules(&unpacked, &version, &tree)?;
    pack(&tree, &directory.join("initramfs"))?;
    let kernel = unpacked.join(format!("boot/vmlinuz-{version}"));
    fs::copy(&kernel, directory.join("vmlinuz")).doing("copy", &kernel)?;
    fs::remove_dir_all(&scratch).doing("remove", &scratch)
}

fn only_entry(directory: &Path) -> Result<String> {
    let entry = fs::read_dir(directory)
        .doing("read", directory)?
        .next()
        .ok_or_else(|| Error::Said(format!("{} is empty", directory.display())))?
        .doing("read", directory)?;
    Ok(entry.file_name().to_string_lossy().into_owned())
}

fn depmod(base: &Path, version: &str) -> Result<()> {
    // depmod lives in /usr/sbin, which is not in every user's PATH.
    let program = ["/usr/sbin/depmod", "/sbin/depmod"]
        .into_iter()
        .find(|p| Path::new(p).exists());
    let mut command = Command::new(program.unwrap_or("depmod"));
    run::captured(command.arg("-b").arg(base).arg(version)).map(drop)
}

fn install_init(init: &[u8], tree: &Path) -> Result<()> {
    let bin = tree.join("bin");
    fs::create_dir_all(&bin).doing("create", &bin)?;
    symlink("bin", tree.join("sbin")).doing("link", &tree.join("sbin"))?;
    let busybox = Path::new("/bin/busybox");
    fs::copy(busybox, bin.join("busybox")).doing("copy", busybox)?;
    let path = tree.join("init");
    fs::write(&path, init).doing("write", &path)?;
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .doing("make executable", &path)
}

fn install_modules(unpacked: &Path, version: &str, tree: &Path) -> Result<()> {
    let modules = PathBuf::from("lib/modules").join(version);
    let list = unpacked.join(&modules).join("modules.dep");
    let text = fs::read_to_string(&list).doing("read", &list)?;
    let dependencies = Dependencies::parse(&text);
    let eager = dependencies.in_order(EAGER.iter().copied());
    let all = dependencies.in_order(EAGER.iter().copied().chain(LAZY.split_whitespace()));
    for file in all {
        let (from, to) = (
            unpacked.join(&modules).join(file),
            tree.join(&modules).join(file),
        );
        let parent = to.parent().unwrap_or(tree);
        fs::create_dir_all(parent).doing("create", parent)?;
        fs::copy(&from, &to).doing("copy", &from)?;
    }
    for name in ["modules.builtin", "modules.order"] {
        let from = unpacked.join(&modules).join(name);
        fs::copy(&from, tree.join(&modules).join(name)).doing("copy", &from)?;
    }
    depmod(tree, version)?;
    let order = tree.join("modules.order");
    let mut file = fs::File::create(&order).doing("create", &order)?;
    for path in eager {
        writeln!(file, "/{}/{path}", modules.display()).doing("write", &order)?;
    }
    Ok(())
}

/// `modules.dep`: file of a module, files of the modules that it needs, nearest first.
struct Dependencies<'a>(BTreeMap<String, (&'a str, Vec<&'a str>)>);

impl<'a> Dependencies<'a> {
    fn parse(text: &'a str) -> Self {
        let entry = |line: &'a str| {
            let (file, needs) = line.split_once(':')?;
            let stem = file.rsplit('/').next()?.split(".ko").next()?;
            Some((
                stem.replace('-', "_"),
                (file, needs.split_whitespace().collect()),
            ))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    /// Files of `names` and of what they need, each once, needs first. A module that this kernel has not is left out.
    fn in_order<'n>(&self, names: impl Iterator<Item = &'n str>) -> Vec<&'a str> {
        let mut files: Vec<&str> = Vec::new();
        for (file, needs) in names.filter_map(|name| self.0.get(name)) {
            for path in needs.iter().rev().chain([file]) {
                if !files.contains(path) {
                    files.push(path);
                }
            }
        }
        files
    }
}

/// Packs a tree into an uncompressed "newc" archive.
fn pack(tree: &Path, archive: &Path) -> Result<()> {
    let mut names = Vec::new();
    collect(tree, Path::new(""), &mut names)?;
    let list = tree.with_file_name("names");
    fs::write(&list, names.join("\n")).doing("write", &list)?;
    let input = fs::File::open(&list).doing("open", &list)?;
    let output = fs::File::create(archive).doing("create", archive)?;
    let result = Command::new("cpio")
        .args(["--create", "--format=newc", "--quiet", "--owner=0:0"])
        .current_dir(tree)
        .stdin(input)
        .stdout(output)
        .stderr(Stdio::piped())
        .spawn()
        .and_then(std::process::Child::wait_with_output)
        .map_err(|source| Error::Start {
            program: "cpio".into(),
            source,
        })?;
    if result.status.success() {
        return Ok(());
    }
    Err(Error::Child {
        command: "cpio --create".into(),
        status: result.status.to_string(),
        tail: format!("\n{}", run::last_lines(&result.stderr)),
    })
}

fn collect(tree: &Path, below: &Path, names: &mut Vec<String>) -> Result<()> {
    let directory = tree.join(below);
    for entry in fs::read_dir(&directory).doing("read", &directory)? {
        let entry = entry.doing("read", &directory)?;
        let path = below.join(entry.file_name());
        names.push(path.display().to_string());
        if entry.file_type().doing("inspect", &directory)?.is_dir() {
            collect(tree, &path, names)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEP: &str = "kernel/kvm/kvm-amd.ko: kernel/ccp.ko kernel/kvm.ko kernel/irqbypass.ko\n\
                       kernel/kvm.ko: kernel/irqbypass.ko\n\
                       kernel/9p.ko.xz: kernel/net/9pnet.ko.xz\nkernel/tun.ko:\n";

    #[test]
    fn modules_come_after_what_they_need_and_once() {
        let dependencies = Dependencies::parse(DEP);
        assert_eq!(
            dependencies.in_order(["kvm_amd", "tun", "kvm", "9p", "absent"].into_iter()),
            [
                "kernel/irqbypass.ko",
                "kernel/kvm.ko",
                "kernel/ccp.ko",
                "kernel/kvm/kvm-amd.ko",
                "kernel/tun.ko",
                "kernel/net/9pnet.ko.xz",
                "kernel/9p.ko.xz",
            ]
        );
    }
}
