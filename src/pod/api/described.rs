//! `resources/openapi.yaml` held against the types that the server reads and writes, in both directions: every
//! field of a type is described, and everything described is a field of it.

mod interfaces;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use cube_guest::stats::{
    AgentStats, ContainerStats, FileSystemStats, InterfaceStats, PodStats, Usage,
};
use cube_guest::{
    Capabilities, DeviceSpec, MountSource, MountSpec, PidNamespace, ProcessSpec, Resources, Rlimit,
    Seccomp, SecuritySpec, TerminalSize,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use super::body::*;
use super::volume_body::*;
use crate::pod::event_log::{EventKind, PodEventRecord};
use crate::vmm::timeline::Stage;

/// The description.
pub(crate) struct Description {
    document: Value,
    /// What of it some value had: paths of properties and of enumerated words.
    seen: RefCell<BTreeSet<String>>,
}

impl Description {
    pub(crate) fn read() -> Self {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/resources/openapi.yaml");
        let text = std::fs::read_to_string(path).unwrap();
        Self {
            document: serde_saphyr::from_str(&text).unwrap(),
            seen: RefCell::default(),
        }
    }

    fn schema(&self, name: &str) -> &Value {
        let schema = &self.document["components"]["schemas"][name];
        assert!(schema.is_object(), "no schema {name}");
        schema
    }

    /// Checks the body of a response to `method path` (a pattern of the table of routes).
    pub(crate) fn check_answer(&self, method: &str, path: &str, status: u16, body: &Value) {
        let responses = &self.document["paths"][path][method.to_lowercase()]["responses"];
        let response = match responses.get(status.to_string()) {
            Some(response) => response,
            None => &self.document["components"]["responses"]["Error"],
        };
        let content = response["content"].as_object();
        let schema = content.and_then(|content| content.values().next());
        let schema = schema.unwrap_or_else(|| panic!("{method} {path} {status}: no content"));
        self.check(&schema["schema"], body, &format!("{method} {path}"));
    }

    /// `value` is as `schema` says, and has nothing else. `at` is for messages, and for what was seen.
    fn check(&self, schema: &Value, value: &Value, at: &str) {
        if let Some(reference) = schema["$ref"].as_str() {
            let name = reference.rsplit('/').next().unwrap();
            return self.check(self.schema(name), value, name);
        }
        if let Some(alternatives) = schema["oneOf"].as_array() {
            let wanted = value.as_object().and_then(|o| o.keys().next());
            let taken = alternatives.iter().position(|alternative| match wanted {
                Some(key) => alternative["properties"].get(key).is_some(),
                None => alternative.get("enum").is_some(),
            });
            let taken = taken.unwrap_or_else(|| panic!("{at}: no alternative for {value}"));
            return self.check(&alternatives[taken], value, at);
        }
        if let Some(words) = schema["enum"].as_array() {
            assert!(words.contains(value), "{at}: {value} is not described");
            self.seen.borrow_mut().insert(format!("{at}={value}"));
            return;
        }
        match (schema["type"].as_str().unwrap_or_default(), value) {
            ("object", Value::Object(fields)) => self.check_object(schema, fields, at),
            ("array", Value::Array(items)) => {
                let each = |item| self.check(&schema["items"], item, at);
                items.iter().for_each(each);
            }
            ("string", Value::String(_))
            | ("integer", Value::Number(_))
            | ("boolean", Value::Bool(_)) => {}
            (kind, value) => panic!("{at}: {value} is no {kind}"),
        }
    }

    fn check_object(&self, schema: &Value, fields: &Map<String, Value>, at: &str) {
        for required in schema["required"].as_array().into_iter().flatten() {
            assert!(
                fields.contains_key(required.as_str().unwrap()),
                "{at}: {required} is required and not there"
            );
        }
        for (name, value) in fields {
            let path = format!("{at}.{name}");
            match (
                schema["properties"].get(name),
                &schema["additionalProperties"],
            ) {
                (Some(property), _) => self.check(property, value, &path),
                (None, Value::Bool(true)) => {}
                (None, each @ Value::Object(_)) => self.check(each, value, &path),
                (None, _) => panic!("{path} is not described"),
            }
            self.seen.borrow_mut().insert(path);
        }
    }

    /// Everything in the schema `name` that a value can have.
    fn described(&self, schema: &Value, at: &str, into: &mut BTreeSet<String>) {
        for alternative in schema["oneOf"].as_array().into_iter().flatten() {
            self.described(alternative, at, into);
        }
        for word in schema["enum"].as_array().into_iter().flatten() {
            into.insert(format!("{at}={word}"));
        }
        if schema.get("items").is_some() {
            self.described(&schema["items"], at, into);
        }
        for (name, property) in schema["properties"].as_object().into_iter().flatten() {
            let path = format!("{at}.{name}");
            self.described(property, &path, into);
            into.insert(path);
        }
    }

    /// A type that the server writes: `full` has every field, `least` those that are always there.
    fn answer<T: Serialize>(&self, name: &str, full: &T, least: &T) {
        let (full, least) = (json!(full), json!(least));
        self.check(self.schema(name), &full, name);
        let keys: BTreeSet<&str> = least.as_object().unwrap().keys().map(|k| &**k).collect();
        assert_eq!(self.required(name), keys, "always there in {name}");
    }

    /// A type that the server reads: without a field that is required it reads nothing, without any other it
    /// does.
    fn request<T: Serialize + DeserializeOwned>(&self, name: &str, full: &T) {
        self.request_value::<T>(name, json!(full));
    }

    fn request_value<T: DeserializeOwned>(&self, name: &str, full: Value) {
        self.check(self.schema(name), &full, name);
        assert!(serde_json::from_value::<T>(full.clone()).is_ok(), "{name}");
        for key in full.as_object().unwrap().keys() {
            let mut less = full.clone();
            less.as_object_mut().unwrap().remove(key);
            let is_read = serde_json::from_value::<T>(less).is_ok();
            let is_required = self.required(name).contains(key.as_str());
            assert_eq!(is_read, !is_required, "{name}.{key}");
        }
        let mut more = full;
        more["surprise"] = json!(1);
        assert!(serde_json::from_value::<T>(more).is_err(), "{name}");
    }

    fn required(&self, name: &str) -> BTreeSet<&str> {
        let required = self.schema(name)["required"].as_array();
        let names = required.into_iter().flatten();
        names.map(|name| name.as_str().unwrap()).collect()
    }
}

fn some_text() -> Option<String> {
    Some("text".to_owned())
}

fn texts() -> Vec<String> {
    vec!["text".to_owned()]
}

fn answers(description: &Description) {
    let exit = Exit {
        exit_code: 1,
        signal: Some(9),
        oom_killed: true,
        reason: some_text(),
    };
    let least = Exit {
        signal: None,
        reason: None,
        ..exit.clone()
    };
    description.answer("Exit", &exit, &least);
    let containers = containers(&exit);
    for container in &containers {
        let least = ContainerStatus {
            started_at: None,
            finished_at: None,
            exit: None,
            log_path: None,
            log_error: None,
            ..container.clone()
        };
        description.answer("ContainerStatus", container, &least);
    }
    for state in ["starting", "ready", "stopping"] {
        let pod = PodStatus {
            id: String::new(),
            state: state.to_owned(),
            created_at: String::new(),
            version: String::new(),
            agent_version: some_text(),
            pid: 1,
            addresses: vec!["::1".parse().unwrap()],
            timeline: timeline(),
            containers: containers.clone(),
        };
        let least = PodStatus {
            agent_version: None,
            ..pod.clone()
        };
        description.answer("PodStatus", &pod, &least);
    }
    let stage = timeline()[0];
    description.answer("BootStage", &stage, &stage);
    let exec = String::new();
    let created = ExecCreated { exec };
    description.answer("ExecCreated", &created, &created);
}

fn containers(exit: &Exit) -> Vec<ContainerStatus> {
    let states = [
        ContainerState::Creating,
        ContainerState::Created,
        ContainerState::Starting,
        ContainerState::Running,
        ContainerState::Paused,
        ContainerState::Exited,
        ContainerState::Removing,
    ];
    let container = |state| ContainerStatus {
        id: String::new(),
        state,
        created_at: String::new(),
        started_at: some_text(),
        finished_at: some_text(),
        exit: Some(exit.clone()),
        log_path: Some("/".into()),
        terminal: true,
        restarts: 1,
        log_error: some_text(),
    };
    states.map(container).into()
}

fn timeline() -> Vec<BootStage> {
    let stages = [
        Stage::Exec,
        Stage::VmmStarted,
        Stage::SpecRead,
        Stage::VmCreated,
        Stage::KernelLoaded,
        Stage::KernelStarted,
        Stage::InitStarted,
        Stage::AgentReady,
        Stage::ContainerStarted,
        Stage::Ended,
    ];
    stages.map(|stage| BootStage { stage, after_us: 1 }).into()
}

fn volume_answers(description: &Description) {
    for state in [
        VolumeState::Creating,
        VolumeState::Ready,
        VolumeState::Removing,
    ] {
        for kind in ["memory", "disk", "block", "files", "nfs"] {
            let volume = VolumeStatus {
                name: String::new(),
                kind: kind.to_owned(),
                state,
                serial: some_text(),
            };
            let least = VolumeStatus {
                serial: None,
                ..volume.clone()
            };
            description.answer("VolumeStatus", &volume, &least);
        }
    }
}

fn events(description: &Description) {
    for kind in [
        EventKind::Ready,
        EventKind::Started,
        EventKind::Restarted,
        EventKind::Exited,
        EventKind::OomKilled,
        EventKind::Removed,
        EventKind::Stopping,
        EventKind::Ended,
    ] {
        let event = PodEventRecord {
            sequence: 1,
            time: String::new(),
            kind,
            container: some_text(),
            exit_code: Some(1),
            message: some_text(),
        };
        let least = PodEventRecord {
            container: None,
            exit_code: None,
            message: None,
            ..event.clone()
        };
        description.answer("Event", &event, &least);
    }
}

fn statistics(description: &Description) {
    let usage = Usage::default();
    description.answer("Usage", &usage, &usage);
    let interface = InterfaceStats::default();
    description.answer("InterfaceStats", &interface, &interface);
    let disk = FileSystemStats::default();
    description.answer("FileSystemStats", &disk, &disk);
    let container = ContainerStats {
        writable: Some(disk),
        ..ContainerStats::default()
    };
    description.answer("ContainerStats", &container, &ContainerStats::default());
    description.answer("AgentStats", &AgentStats::default(), &AgentStats::default());
    let guest = PodStats {
        interfaces: vec![interface],
        containers: vec![container],
        ..PodStats::default()
    };
    description.answer("PodStats", &guest, &guest);
    let memory = VmmMemory::default();
    description.answer("VmmMemory", &memory, &memory);
    let stats = Stats {
        guest,
        vmm: Some(memory),
    };
    description.answer("Stats", &stats, &Stats::default());
}

fn process() -> ProcessSpec {
    let limit = Rlimit {
        name: "RLIMIT_NOFILE".to_owned(),
        soft: 1,
        hard: 2,
    };
    ProcessSpec {
        argv: texts(),
        env: texts(),
        cwd: "/".to_owned(),
        user: "1".to_owned(),
        additional_gids: vec![1],
        capabilities: Some(Capabilities {
            bounding: texts(),
            effective: texts(),
            inheritable: texts(),
            permitted: texts(),
            ambient: texts(),
        }),
        no_new_privileges: true,
        rlimits: vec![limit],
        oom_score_adj: Some(1),
        ..ProcessSpec::default()
    }
}

/// The API draws tokens itself: `stdio` is not described.
fn without_stdio(full: &impl Serialize) -> Value {
    let mut value = json!(full);
    let process = value.get_mut("process").and_then(Value::as_object_mut);
    process.unwrap().remove("stdio");
    value
}

fn requests(description: &Description) {
    let file = DiskFile {
        path: "/".into(),
        size: Some(1),
    };
    description.request("DiskFile", &file);
    let whole = without_stdio(&json!({"process": process()}));
    description.request_value::<ProcessSpec>("Process", whole["process"].clone());
    let size = TerminalSize {
        rows: 1,
        columns: 2,
    };
    description.request("TerminalSize", &size);
    let (signal, all) = (1, true);
    description.request("Kill", &Kill { signal, all });
    description.request("Stop", &Stop { grace_ms: 1 });
    description.request("Resources", &resources());
    let capabilities = process().capabilities.unwrap();
    description.request("Capabilities", &capabilities);
    description.request("Rlimit", &process().rlimits[0]);
    for mount in mounts() {
        description.request("Mount", &mount);
    }
    description.request("Device", &device());
    for seccomp in [
        Seccomp::Default,
        Seccomp::Unconfined,
        Seccomp::Programs(vec![vec![1]]),
    ] {
        let security = SecuritySpec {
            privileged: true,
            masked_paths: Some(texts()),
            read_only_paths: Some(texts()),
            seccomp,
        };
        description.request("Security", &security);
    }
    for pid_namespace in [PidNamespace::Container, PidNamespace::Pod] {
        let container = CreateContainer {
            id: "c".to_owned(),
            image: vec![file.clone()],
            writable: Some(file.clone()),
            read_only_root: true,
            process: process(),
            stdin: true,
            stdin_once: true,
            terminal: Some(size),
            log_path: Some("/".into()),
            no_log: true,
            resources: resources(),
            mounts: mounts(),
            devices: vec![device()],
            security: SecuritySpec::default(),
            seccomp_profile: Some(json!({"defaultAction": "SCMP_ACT_ALLOW"})),
            pid_namespace,
        };
        description.request_value::<CreateContainer>("CreateContainer", without_stdio(&container));
    }
    let exec = CreateExec {
        process: process(),
        stdin: true,
        terminal: Some(size),
    };
    description.request_value::<CreateExec>("CreateExec", without_stdio(&exec));
    volumes(description, &file);
}

fn volumes(description: &Description, file: &DiskFile) {
    let disk = |file_system: &str| NewVolume::Disk {
        file: file.clone(),
        file_system: file_system.to_owned(),
        root_mode: Some(1),
        read_only: true,
    };
    let nfs = NewVolume::Nfs {
        server: String::new(),
        path: String::new(),
        options: String::new(),
        read_only: true,
    };
    let block = NewVolume::Block {
        file: file.clone(),
        read_only: true,
    };
    let memory = NewVolume::Memory {
        size_bytes: Some(1),
    };
    let files = NewVolume::Files {};
    for source in [memory, disk("ext4"), disk("erofs"), block, files, nfs] {
        let name = "v".to_owned();
        description.request("CreateVolume", &CreateVolume { name, source });
    }
    for content in [Content::Text("text".to_owned()), Content::Base64(vec![1])] {
        let put = PutFile {
            path: "a".to_owned(),
            mode: 1,
            uid: 1,
            gid: 1,
            content,
        };
        description.request("PutFile", &put);
        description.request("PutFiles", &PutFiles { files: vec![put] });
    }
}

fn resources() -> Resources {
    Resources {
        memory_max: Some(1),
        cpu_quota_us: Some(1),
        cpu_period_us: Some(1),
        cpu_weight: Some(1),
        pids_max: Some(1),
        cpuset_cpus: some_text(),
        memory_low: Some(1),
        memory_high: Some(1),
        hugepages: BTreeMap::from([("2MB".to_owned(), 1)]),
    }
}

fn mounts() -> Vec<MountSpec> {
    let volume = MountSource::Volume {
        volume: "v".to_owned(),
        sub_path: "a".to_owned(),
    };
    let tmpfs = MountSource::Tmpfs {
        size_bytes: Some(1),
        mode: 1,
    };
    let mount = |source| MountSpec {
        path: "/".to_owned(),
        source,
        read_only: true,
    };
    [volume, tmpfs].map(mount).into()
}

fn device() -> DeviceSpec {
    DeviceSpec {
        path: "/dev/x".to_owned(),
        serial: "hot1".to_owned(),
        mode: 1,
        uid: 1,
        gid: 1,
    }
}

#[test]
fn every_field_is_described_and_everything_described_is_a_field() {
    let description = Description::read();
    answers(&description);
    events(&description);
    statistics(&description);
    volume_answers(&description);
    requests(&description);
    interfaces::answers(&description);
    interfaces::requests(&description);
    // These two have no type: the first is what refusals are, the second how a machine ended.
    let error = json!({"error": "sentence", "field": "name"});
    description.check(description.schema("Error"), &error, "Error");
    let ended = json!({"ended": "the guest powered off"});
    description.check(description.schema("Ended"), &ended, "Ended");
    let mut described = BTreeSet::new();
    let schemas = description.document["components"]["schemas"].as_object();
    for (name, schema) in schemas.unwrap() {
        description.described(schema, name, &mut described);
    }
    let seen = description.seen.borrow();
    let unseen: Vec<&String> = described.difference(&seen).collect();
    assert!(
        unseen.is_empty(),
        "described, and no field of a type: {unseen:?}"
    );
}
