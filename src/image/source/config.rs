//! The image configuration: the part of it that Cube uses. The OCI and the Docker kind agree in it.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};

/// What an image's containers run; the fields of `config` in the image configuration.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", default)]
pub struct ImageConfig {
    /// `user`, `uid`, `user:group` or `uid:gid`; empty: root.
    #[serde(alias = "User", deserialize_with = "or_default")]
    pub user: String,
    /// `NAME=value`.
    #[serde(alias = "Env", deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// What runs in front of the command.
    #[serde(alias = "Entrypoint", deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// The default command, or arguments of the entrypoint.
    #[serde(alias = "Cmd", deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// Working directory; empty: `/`.
    #[serde(alias = "WorkingDir", deserialize_with = "or_default")]
    pub working_dir: String,
    /// Such as `80/tcp`, sorted.
    #[serde(alias = "ExposedPorts", deserialize_with = "keys_or_list")]
    pub exposed_ports: Vec<String>,
    /// Directories that are to be volumes, sorted.
    #[serde(alias = "Volumes", deserialize_with = "keys_or_list")]
    pub volumes: Vec<String>,
    /// Labels.
    #[serde(alias = "Labels", deserialize_with = "or_default")]
    pub labels: BTreeMap<String, String>,
    /// The signal that asks a container to stop, such as `SIGTERM`; empty: that one.
    #[serde(alias = "StopSignal", deserialize_with = "or_default")]
    pub stop_signal: String,
}

/// The whole configuration.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct ConfigFile {
    #[serde(default)]
    pub(super) created: Option<String>,
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) os: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) config: ImageConfig,
    pub(super) rootfs: RootFs,
}

/// The layers' diff ids.
#[derive(Debug, Clone, Deserialize)]
pub(super) struct RootFs {
    #[serde(default, deserialize_with = "or_default")]
    pub(super) diff_ids: Vec<String>,
}

/// Writers in Go put `null` for what is empty.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// A set in Go's JSON is an object with empty values; Cube's own records have a list.
fn keys_or_list<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Set {
        Keys(BTreeMap<String, serde_json::Value>),
        List(Vec<String>),
    }
    Ok(match Option::deserialize(deserializer)? {
        Some(Set::Keys(keys)) => keys.into_keys().collect(),
        Some(Set::List(list)) => list,
        None => Vec::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_docker_writes_is_understood() {
        let json = r#"{"architecture":"amd64","os":"linux","created":"2024-01-02T03:04:05.6Z",
            "container":"x","container_config":{"Env":null},"history":[{"empty_layer":true}],
            "config":{"Hostname":"","User":"app:7","Env":["A=b"],"Entrypoint":null,"Cmd":["sh","-c"],
            "ExposedPorts":{"80/tcp":{},"53/udp":{}},"Volumes":null,"Labels":{"a":"b"},
            "WorkingDir":"/srv","OnBuild":null,"StopSignal":"SIGQUIT"},
            "rootfs":{"type":"layers","diff_ids":["sha256:00"]}}"#;
        let file: ConfigFile = serde_json::from_str(json).unwrap();
        assert_eq!(file.rootfs.diff_ids, ["sha256:00"]);
        let config = file.config;
        assert_eq!(config.user, "app:7");
        assert_eq!(config.entrypoint, [""; 0]);
        assert_eq!(config.exposed_ports, ["53/udp", "80/tcp"]);
        assert_eq!(config.stop_signal, "SIGQUIT");
        let stored = serde_json::to_string(&config).unwrap();
        assert_eq!(
            serde_json::from_str::<ImageConfig>(&stored).unwrap(),
            config
        );
    }

    #[test]
    fn a_configuration_without_a_config_is_empty() {
        let file: ConfigFile = serde_json::from_str(r#"{"config":null,"rootfs":{}}"#).unwrap();
        assert_eq!(file.config, ImageConfig::default());
    }
}
