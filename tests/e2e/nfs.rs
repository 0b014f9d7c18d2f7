//! A pod's volume on an NFS server: nfs-ganesha, in a network namespace of its own.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::thread::sleep;
use std::time::Duration;

use serde_json::json;

use crate::background::specified;
use crate::networks::{assert_no_network_left, networked};
use crate::pod_volumes::{shell, staying};

const NAMESPACE: &str = "cubenfs";
const HOST: &str = "10.87.0.1";
const SERVER: &str = "10.87.0.2";

/// The server, and the directory that it exports as `/data`.
struct Server {
    process: Child,
    export: PathBuf,
    /// On a tmpfs: the server finds files again by handles, which an overlay does not have.
    directory: tempfile::TempDir,
}

fn ip(words: &str) -> bool {
    let status = Command::new("ip").args(words.split(' ')).status();
    status.unwrap().success()
}

/// Serves.
fn serve() -> Server {
    let must = |words: &str| assert!(ip(words), "ip {words}");
    must(&format!("netns add {NAMESPACE}"));
    must(&format!(
        "link add {NAMESPACE} type veth peer name eth0 netns {NAMESPACE}"
    ));
    must(&format!("addr add {HOST}/30 dev {NAMESPACE}"));
    must(&format!("link set {NAMESPACE} up"));
    for words in [
        "link set lo up".to_owned(),
        format!("addr add {SERVER}/30 dev eth0"),
        "link set eth0 up".to_owned(),
        format!("route add default via {HOST}"),
    ] {
        must(&format!("-n {NAMESPACE} {words}"));
    }
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| directory.path().join(name);
    let (export, state) = (path("export"), path("state"));
    fs::create_dir(&export).unwrap();
    fs::create_dir(&state).unwrap();
    fs::write(path("conf"), configuration(&export, &state)).unwrap();
    let process = Command::new("ip")
        .args(["netns", "exec", NAMESPACE, "ganesha.nfsd", "-F", "-f"])
        .arg(path("conf"))
        .arg("-L")
        .arg(path("log"))
        .arg("-p")
        .arg(path("pid"))
        .spawn()
        .unwrap();
    let mut server = Server {
        process,
        export,
        directory,
    };
    server.wait();
    server
}

/// Version 4 alone, so that no port mapper is needed; nobody has locks to reclaim.
fn configuration(export: &std::path::Path, state: &std::path::Path) -> String {
    format!(
        "NFS_CORE_PARAM {{ Protocols = 4; Enable_NLM = false; Enable_RQUOTA = false; }}
NFSv4 {{ Graceless = true; RecoveryBackend = fs_ng; RecoveryRoot = {}; Minor_Versions = 1, 2; }}
EXPORT {{ Export_Id = 1; Path = {}; Pseudo = /data; Access_Type = RW; Squash = No_Root_Squash;
    SecType = sys; Protocols = 4; Transports = TCP; FSAL {{ Name = VFS; }} }}
",
        state.display(),
        export.display()
    )
}

impl Server {
    /// Waits until it takes connections.
    fn wait(&mut self) {
        while TcpStream::connect((SERVER, 2049)).is_err() {
            let log = || fs::read_to_string(self.directory.path().join("log")).unwrap_or_default();
            let ended = self.process.try_wait().unwrap();
            assert!(ended.is_none(), "the NFS server ended: {}", log());
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // The interface goes with it.
        ip(&format!("netns del {NAMESPACE}"));
    }
}

#[test]
fn containers_share_a_directory_of_a_server_and_read_only_refuses() {
    let server = serve();
    fs::write(server.export.join("before"), "was there\n").unwrap();
    let nfs = |read_only: bool| json!({"server": SERVER, "path": "/data", "readOnly": read_only});
    let spec = json!({
        "volumes": [{"name": "v", "nfs": nfs(false)}, {"name": "r", "nfs": nfs(true)}],
        "containers": [
            staying("a", json!([{"name": "v", "mountPath": "/v"}])),
            staying("b", json!([
                {"name": "v", "mountPath": "/w", "readOnly": true}, {"name": "r", "mountPath": "/r"},
            ])),
        ],
    });
    let pod = specified(networked(), &[], &spec);
    let said = shell(
        &pod,
        "a",
        "cat /v/before; echo of a > /v/file; chmod 666 /v/file",
    );
    assert_eq!(said, "was there\n");
    assert_eq!(
        fs::read_to_string(server.export.join("file")).unwrap(),
        "of a\n"
    );
    assert_eq!(shell(&pod, "b", "cat /w/file /r/file"), "of a\nof a\n");
    let said = shell(&pod, "b", "echo no > /w/file; echo no > /r/file");
    assert_eq!(said.matches("Read-only file system").count(), 2, "{said}");
    pod.stop();
    assert_no_network_left(&pod.machine);
}
