//! Shell scripts in the place of `cube-vmm`.

use std::os::unix::fs::PermissionsExt;

use super::*;

struct Script {
    directory: tempfile::TempDir,
}

impl Script {
    fn new(text: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmm");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        Self { directory }
    }

    fn file(&self, name: &str, content: &str) -> NamedFile {
        let path = self.directory.path().join(name);
        std::fs::write(&path, content).unwrap();
        NamedFile::open("kernel", &path).unwrap()
    }

    fn start(&self, kernel: NamedFile) -> VmmProcess {
        start(&self.directory.path().join("vmm"), kernel).unwrap()
    }
}

fn start(program: &Path, kernel: NamedFile) -> Result<VmmProcess, VmmError> {
    let mut inherited = Inherited::default();
    let spec = MachineSpec {
        kernel: inherited.pass(kernel),
        initramfs: None,
        command_line: String::new(),
        cpus: 1,
        memory_mib: 64,
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        rng: false,
        huge_pages: false,
        spare_slots: 0,
        cpuid: None,
        console: None,
    };
    let launch = Launch {
        program,
        spec: &spec,
        pod: b"the pod",
        inherited,
        others: &[],
    };
    VmmProcess::start(launch, true)
}

fn wait(process: &mut VmmProcess) -> MachineEnd {
    loop {
        if let Some(end) = process.turn().unwrap() {
            return end.clone();
        }
        let interests = process.interests();
        let mut fds: Vec<PollFd<'_>> = interests
            .iter()
            .map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN))
            .collect();
        rustix::event::poll(&mut fds, None).unwrap();
    }
}

#[test]
fn it_reads_its_specification_and_inherited_files_and_tells_its_timeline() {
    let script = Script::new(
        r#"spec=$(cat /proc/self/fd/$2); kernel=${spec#*'"fd":'}; kernel=${kernel%%\}*}
        echo "$(cat /proc/self/fd/$kernel) and $(cat /proc/self/fd/$4)" >&2
        echo stages > /proc/self/fd/$8; exit 7"#,
    );
    let mut process = script.start(script.file("kernel", "the kernel's text"));
    let end = wait(&mut process);
    assert_eq!(end.message, "the kernel's text and the pod");
    assert_eq!((end.status.code(), end.killed_here), (Some(7), false));
    assert_eq!(process.timeline(), "stages\n");
}

#[test]
fn it_sees_the_end_of_this_process() {
    let script = Script::new("cat /proc/self/fd/$6; exit 3");
    let mut process = script.start(script.file("kernel", ""));
    let (_reader, writer) = io::pipe().unwrap();
    // What the end of this process does to its descriptors.
    drop(std::mem::replace(&mut process._lifetime, writer));
    assert_eq!(wait(&mut process).status.code(), Some(3));
}

#[test]
fn files_are_called_by_their_paths() {
    let script = Script::new(
        r#"spec=$(cat /proc/self/fd/$2); kernel=${spec#*'"fd":'}; kernel=${kernel%%\}*}
        printf 'cube-vmm: /proc/self/fd/%s: \033bad, /proc/self/fd/99999' $kernel >&2; exit 1"#,
    );
    let mut process = script.start(script.file("vmlinux", ""));
    let path = script.directory.path().join("vmlinux");
    let expected = format!("{}: \u{fffd}bad, /proc/self/fd/99999", path.display());
    assert_eq!(wait(&mut process).sentence(), expected);
}

#[test]
fn no_other_descriptor_is_inherited() {
    let script = Script::new("ls -l /proc/self/fd >&2");
    let kernel = script.file("kernel", "");
    let _unrelated = script.file("other", "");
    let listing = wait(&mut script.start(kernel)).message;
    assert!(listing.contains("/kernel"), "{listing}");
    assert!(!listing.contains("/other"), "{listing}");
}

#[test]
fn killing_it_is_told_from_its_own_end() {
    let script = Script::new("exec cat /proc/self/fd/0 /dev/zero > /dev/null");
    let mut process = script.start(script.file("kernel", ""));
    process.kill();
    let end = wait(&mut process);
    assert!(end.killed_here);
    assert_eq!(end.sentence(), "cube-vmm was killed by signal 9");
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let script = Script::new("");
    let kernel = script.file("kernel", "");
    let error = start(Path::new("/nowhere/cube-vmm"), kernel).unwrap_err();
    assert!(error.to_string().contains("/nowhere/cube-vmm"), "{error}");
}
