//! One image store per run of the tests, one directory for pods per test, and `cube` run in it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{FlockOperation, flock};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// The image of busybox, as the tests call it.
pub(crate) const BUSYBOX: &str = "busybox";

/// A path that `cargo xtask test` gives.
pub(crate) fn given(variable: &str) -> PathBuf {
    let value = std::env::var_os(variable).unwrap_or_else(|| {
        panic!("{variable} is not set: these tests run by `cargo xtask test`, which sets it")
    });
    PathBuf::from(value)
}

/// Imports an image into the store of all tests, once, whichever process comes first.
pub(crate) fn import(name: &str, variable: &str) -> PathBuf {
    import_path(name, &given(variable))
}

/// The program `tree-digest` (examples/), which `cargo xtask test` builds with the tests.
pub(crate) fn tree_digest() -> PathBuf {
    let binaries = Path::new(env!("CARGO_BIN_EXE_cube")).parent().unwrap();
    binaries.join("examples/tree-digest")
}

/// The same for the image at `path`.
pub(crate) fn import_path(name: &str, path: &Path) -> PathBuf {
    assert!(
        std::env::var_os("CUBE_E2E").is_some(),
        "real guests run only by `cargo xtask test`, which finds or makes a machine that can run them"
    );
    let store = std::env::temp_dir().join("cube-e2e-store");
    fs::create_dir_all(&store).unwrap();
    let lock = File::create(store.with_extension("lock")).unwrap();
    flock(&lock, FlockOperation::LockExclusive).unwrap();
    let done = store.with_extension(name);
    if !done.exists() {
        let import = Command::new(env!("CARGO_BIN_EXE_cube"))
            .arg("import")
            .arg(path)
            .arg(name)
            .env("CUBE_STORE", &store)
            .output()
            .unwrap();
        assert!(import.status.success(), "{}", text(&import.stderr));
        File::create(done).unwrap();
    }
    store
}

/// Bytes as text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A place to run `cube` in.
pub(crate) struct Machine {
    run_directory: tempfile::TempDir,
    store: PathBuf,
    variables: Vec<(String, PathBuf)>,
}

/// The place that most tests want: a store with busybox, no pods.
pub(crate) fn machine() -> Machine {
    Machine {
        store: import(BUSYBOX, "CUBE_TEST_IMAGE"),
        run_directory: tempfile::tempdir().unwrap(),
        variables: Vec::new(),
    }
}

/// Runs `script` in busybox and returns what it says on standard output.
pub(crate) fn say(options: &[&str], script: &str) -> String {
    let output = machine().shell(options, script);
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

impl Machine {
    /// Sets a variable for `cube`.
    pub(crate) fn with(mut self, variable: &str, value: impl AsRef<Path>) -> Self {
        let value = value.as_ref().to_owned();
        self.variables.push((variable.to_owned(), value));
        self
    }

    /// `cube` with `arguments`, not started.
    pub(crate) fn command<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cube"));
        command.args(arguments);
        self.set_up(&mut command);
        command
    }

    fn set_up(&self, command: &mut Command) {
        command
            .env("CUBE_STORE", &self.store)
            .env("CUBE_RUN_DIR", self.run_directory.path())
            .env("CUBE_KERNEL", given("CUBE_KERNEL"))
            .env("CUBE_INIT", given("CUBE_INIT"))
            // Tests of networks ask for one; the others need not wait for it.
            .env("CUBE_NET", "none")
            .envs(self.variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null());
    }

    /// Runs `cube` to its end.
    pub(crate) fn cube<A: AsRef<OsStr>>(&self, arguments: &[A]) -> Output {
        let output = self.command(arguments).output().unwrap();
        self.assert_nothing_left();
        output
    }

    /// Runs `script` in a shell in busybox.
    pub(crate) fn shell(&self, options: &[&str], script: &str) -> Output {
        self.cube(&shell_arguments(options, script))
    }

    /// Starts `script` in a shell in busybox, with pipes.
    pub(crate) fn start(&self, options: &[&str], script: &str) -> Running<'_> {
        let mut child = self
            .command(&shell_arguments(options, script))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Running {
            machine: self,
            stdout: child.stdout.take().map(BufReader::new),
            child,
        }
    }

    /// Starts `script` on a terminal of 24 lines and 80 columns.
    pub(crate) fn terminal(&self, script: &str) -> Terminal<'_> {
        let master =
            openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&master).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        let mut command = Command::new("setsid");
        command
            .arg("--ctty")
            .arg(env!("CARGO_BIN_EXE_cube"))
            .args(shell_arguments(&["-it"], script));
        self.set_up(&mut command);
        let mut terminal = Terminal {
            machine: self,
            slave,
            master: master.into(),
            child: None,
            seen: String::new(),
        };
        terminal.resize(24, 80);
        let stdio = || Stdio::from(terminal.slave.try_clone().unwrap());
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        terminal.child = Some(command.spawn().unwrap());
        terminal
    }

    /// Processes that were started in this place, by `/proc/<pid>`, with their names.
    pub(crate) fn processes(&self) -> Vec<(i32, String)> {
        let marker = format!("CUBE_RUN_DIR={}", self.run_directory.path().display());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else {
                continue;
            };
            // A process that is ending has no environment, or is not there any more.
            let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
            if environment
                .split(|b| *b == 0)
                .any(|e| e == marker.as_bytes())
            {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                found.push((pid, name.trim().to_owned()));
            }
        }
        found
    }

    /// Names in the directory for pods.
    pub(crate) fn pods(&self) -> Vec<String> {
        fs::read_dir(self.run_directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| !name.starts_with('.'))
            .collect()
    }

    /// The directory for pods.
    pub(crate) fn run_directory(&self) -> &Path {
        self.run_directory.path()
    }

    /// The image store.
    pub(crate) fn store(&self) -> &Path {
        &self.store
    }

    /// Waits until every process that was started in this place has ended.
    pub(crate) fn wait_for_processes(&self) {
        for (pid, _) in self.processes() {
            // One that has ended cannot be opened.
            if let Ok(pidfd) = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()) {
                wait_for_end(&pidfd);
            }
        }
    }

    /// No process, no pod directory.
    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.processes(), [], "processes left behind");
        assert_eq!(self.pods(), [""; 0], "pod directories left behind");
    }
}

/// `cube run` of `script` in a shell in busybox.
fn shell_arguments<'a>(options: &[&'a str], script: &'a str) -> Vec<&'a str> {
    let image = [BUSYBOX, "--", "sh", "-c", script];
    [&["run"], options, &image].concat()
}

/// `cube run` while it runs.
pub(crate) struct Running<'a> {
    machine: &'a Machine,
    child: Child,
    stdout: Option<BufReader<ChildStdout>>,
}

impl Drop for Running<'_> {
    /// A failed test leaves no machine behind, for which others of its values may wait.
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Running<'_> {
    /// Waits for the next line on standard output.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        let stdout = self.stdout.as_mut().expect("standard output is open");
        stdout.read_line(&mut line).unwrap();
        line
    }

    /// Writes all of `bytes` to standard input, then closes it.
    pub(crate) fn feed(&mut self, bytes: Vec<u8>) {
        let mut stdin = self.child.stdin.take().expect("standard input is open");
        // From a thread: what comes back must be read meanwhile.
        std::thread::spawn(move || stdin.write_all(&bytes).unwrap());
    }

    /// Writes a line to standard input, which stays open.
    pub(crate) fn say(&mut self, line: &str) {
        let stdin = self.child.stdin.as_mut().expect("standard input is open");
        writeln!(stdin, "{line}").unwrap();
    }

    /// Closes the reading end of standard output.
    pub(crate) fn stop_reading(&mut self) {
        self.stdout = None;
    }

    /// Sends `signal` to `cube`.
    pub(crate) fn signal(&self, signal: Signal) {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// A descriptor that is readable when `cube-vmm` has ended, and the means to end it.
    pub(crate) fn vmm(&self) -> OwnedFd {
        let processes = self.machine.processes();
        let (pid, _) = processes
            .iter()
            .find(|(_, name)| name == "cube-vmm")
            .unwrap();
        let pid = Pid::from_raw(*pid).unwrap();
        pidfd_open(pid, PidfdFlags::empty()).unwrap()
    }

    /// Waits for the end, and for everything that was said.
    pub(crate) fn finish(mut self) -> Output {
        drop(self.child.stdin.take());
        let mut stderr = self.child.stderr.take().unwrap();
        let errors = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            stderr.read_to_end(&mut bytes).unwrap();
            bytes
        });
        let mut stdout = Vec::new();
        if let Some(reader) = &mut self.stdout {
            reader.read_to_end(&mut stdout).unwrap();
        }
        let output = Output {
            status: self.child.wait().unwrap(),
            stdout,
            stderr: errors.join().unwrap(),
        };
        if output.status.signal().is_none() {
            self.machine.assert_nothing_left();
        }
        output
    }
}

/// Waits until the process behind `pidfd` has ended.
pub(crate) fn wait_for_end(pidfd: &OwnedFd) {
    poll(&mut [PollFd::new(pidfd, PollFlags::IN)], None).unwrap();
}

/// Kills a process and waits for its end, when it holds no file and no lock any more. One that is still ending is no
/// longer among [`Machine::processes`].
pub(crate) fn kill(pid: Pid) {
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&pidfd, Signal::KILL).unwrap();
    wait_for_end(&pidfd);
}

/// `cube run -it` on a terminal.
pub(crate) struct Terminal<'a> {
    machine: &'a Machine,
    master: File,
    slave: OwnedFd,
    child: Option<Child>,
    seen: String,
}

impl Terminal<'_> {
    /// Changes the window's size.
    pub(crate) fn resize(&mut self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).unwrap();
    }

    /// Types.
    pub(crate) fn keys(&mut self, keys: &str) {
        self.master.write_all(keys.as_bytes()).unwrap();
    }

    /// Waits until `text` is on the screen, after what was waited for before.
    pub(crate) fn expect(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let length = self.master.read(&mut buffer).unwrap();
            self.seen
                .push_str(&String::from_utf8_lossy(&buffer[..length]));
        }
    }

    /// Whether typed characters are shown and lines edited: not raw mode.
    pub(crate) fn is_cooked(&self) -> bool {
        let attributes = rustix::termios::tcgetattr(&self.slave).unwrap();
        attributes
            .local_modes
            .contains(rustix::termios::LocalModes::ICANON | rustix::termios::LocalModes::ECHO)
    }

    /// Waits for the end; returns the exit status.
    pub(crate) fn finish(&mut self) -> Option<i32> {
        let status = self.child.take().unwrap().wait().unwrap();
        self.machine.assert_nothing_left();
        status.code()
    }
}
