//! Network configurations: `/etc/cni/net.d`, and the one that Cube brings.
#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::CniError;

/// Where configurations are, unless `NETCONFPATH` says otherwise.
const DIRECTORY: &str = "/etc/cni/net.d";

/// A bridge with IPv4 and IPv6, for hosts that nobody has configured.
const SHIPPED: &str = include_str!("../../../resources/cni/cube.conflist");

/// The newest version of CNI that is spoken here.
const NEWEST: &str = "1.1.0";

/// The capability of plug-ins that publish ports.
const PORT_MAPPINGS: &str = "portMappings";

/// A chain of plug-ins.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkConfig {
    /// The network's name.
    pub name: String,
    /// The version of CNI that it is written in.
    pub version: String,
    /// The plug-ins, in the order of ADD; at least one.
    pub plugins: Vec<PluginConfig>,
    /// Where it comes from.
    pub path: PathBuf,
    disable_check: bool,
    disable_gc: bool,
    /// As it was read.
    source: Value,
}

/// The configuration of one plug-in.
#[derive(Debug, Clone, PartialEq)]
pub struct PluginConfig {
    kind: String,
    /// All of it.
    pub(super) config: Map<String, Value>,
}

impl PluginConfig {
    /// The plug-in's type: the name of its program.
    pub fn kind(&self) -> &str {
        &self.kind
    }

    pub(super) fn has_capability(&self, capability: &str) -> bool {
        let capabilities = self.config.get("capabilities");
        capabilities.and_then(|c| c.get(capability)) == Some(&Value::Bool(true))
    }
}

impl NetworkConfig {
    /// The first configuration by file name; none: there is no directory or nothing in it.
    ///
    /// # Errors
    /// A configuration that cannot be used.
    pub fn first() -> Result<Option<Self>, CniError> {
        let directory = std::env::var_os("NETCONFPATH").filter(|path| !path.is_empty());
        Self::first_in(&directory.map_or_else(|| DIRECTORY.into(), PathBuf::from))
    }

    /// The first configuration in `directory` by file name.
    ///
    /// # Errors
    /// As [`NetworkConfig::first`].
    pub fn first_in(directory: &Path) -> Result<Option<Self>, CniError> {
        match files(directory, &["conflist", "conf", "json"]).first() {
            Some(path) => Self::load(path).map(Some),
            None => Ok(None),
        }
    }

    /// Reads the list in `path`, and the plug-ins that are files of their own: those of a network called `n` in
    /// the directory `n` beside it, unless `loadOnlyInlinedPlugins` says otherwise.
    ///
    /// # Errors
    /// The file that cannot be used.
    pub fn load(path: &Path) -> Result<Self, CniError> {
        let mut source = read_json(path)?;
        let is_list = source.get("type").is_none();
        let name = source.get("name").and_then(Value::as_str);
        // What is no plain name is refused below, before it is taken for a path.
        let name = name.filter(|name| is_plain(name) && is_list);
        if let Some(name) = name.filter(|_| !flag(&source, "loadOnlyInlinedPlugins")) {
            let directory = path.with_file_name(name);
            let more = files(&directory, &["conf"]);
            let more = more.iter().map(|path| read_json(path));
            let mut plugins = more.collect::<Result<Vec<_>, _>>()?;
            if let Some(Value::Array(inlined)) = source.get_mut("plugins") {
                inlined.append(&mut plugins);
            } else if !plugins.is_empty() && source.get("plugins").is_none() {
                source["plugins"] = Value::Array(plugins);
            }
        }
        Self::from_value(source, path).map_err(|fault| CniError::Config {
            path: path.to_owned(),
            fault,
        })
    }

    /// The one that Cube brings. It is not written anywhere: a file in `/etc/cni/net.d` would be every other
    /// runtime's, too.
    ///
    /// # Errors
    /// None, in a program that was tested.
    pub fn shipped() -> Result<Self, CniError> {
        Self::parse(SHIPPED, Path::new("resources/cni/cube.conflist"))
    }

    /// Reads a list of plug-ins, or a single plug-in's configuration. `path` is for messages.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, path: &Path) -> Result<Self, CniError> {
        let fault = |fault: String| CniError::Config {
            path: path.to_owned(),
            fault,
        };
        let source: Value = serde_json::from_str(text).map_err(|e| fault(e.to_string()))?;
        Self::from_value(source, path).map_err(fault)
    }

    /// As [`NetworkConfig::parse`], from what [`NetworkConfig::source`] gave.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_value(source: Value, path: &Path) -> Result<Self, String> {
        let text = |field: &str| source.get(field).and_then(Value::as_str);
        let name = text("name").ok_or("has no `name`")?;
        if !is_plain(name) {
            return Err(format!(
                "`name` is {name:?}: letters, digits, `_`, `.` and `-` only"
            ));
        }
        let plugins = match source.get("plugins") {
            Some(plugins) => plugins.as_array().ok_or("`plugins` is no list")?.clone(),
            None => vec![source.clone()],
        };
        let plugins = plugins
            .into_iter()
            .map(plugin)
            .collect::<Result<Vec<_>, _>>()?;
        if plugins.is_empty() {
            return Err("`plugins` is empty".into());
        }
        Ok(Self {
            name: name.to_owned(),
            version: version(&source),
            plugins,
            path: path.to_owned(),
            disable_check: flag(&source, "disableCheck"),
            disable_gc: flag(&source, "disableGC"),
            source,
        })
    }

    /// Settings of the pod's kernel (paths below `/proc/sys`) that the plug-in `tuning` makes for `interface`. It
    /// makes them in the host's namespace, whose stack a machine's frames never see: the guest's kernel has to.
    ///
    /// # Errors
    /// One that does not belong to the network.
    pub fn sysctls(&self, interface: &str) -> Result<BTreeMap<String, String>, CniError> {
        let mut sysctls = BTreeMap::new();
        let tuning = self.plugins.iter().filter(|plugin| plugin.kind == "tuning");
        let given = tuning.filter_map(|plugin| plugin.config.get("sysctl")?.as_object());
        for (key, value) in given.flatten() {
            let path = key.replace('.', "/").replacen("IFNAME", interface, 1);
            let plain = path.split('/').all(|part| !part.is_empty());
            let value = value.as_str().filter(|_| plain && path.starts_with("net/"));
            let value = value.ok_or_else(|| CniError::Config {
                path: self.path.clone(),
                fault: format!(
                    "the plug-in `tuning` has the sysctl `{key}`; it must be the network's, as text"
                ),
            })?;
            sysctls.insert(path, value.to_owned());
        }
        Ok(sysctls)
    }

    /// What it was read from.
    pub fn source(&self) -> &Value {
        &self.source
    }

    pub(super) fn has_check(&self) -> bool {
        !self.disable_check && self.is_at_least([0, 4, 0])
    }

    pub(super) fn has_gc(&self) -> bool {
        !self.disable_gc && self.is_at_least([1, 1, 0])
    }

    fn is_at_least(&self, version: [u32; 3]) -> bool {
        numbers(&self.version) >= version.to_vec()
    }

    /// The arguments that publish `ports`; none for none.
    ///
    /// # Errors
    /// No plug-in can.
    pub fn port_mappings(&self, ports: &[PortMapping]) -> Result<Map<String, Value>, CniError> {
        let mut arguments = Map::new();
        if ports.is_empty() {
            return Ok(arguments);
        }
        if !self
            .plugins
            .iter()
            .any(|plugin| plugin.has_capability(PORT_MAPPINGS))
        {
            return Err(CniError::NoPortMappings {
                network: self.name.clone(),
                path: self.path.clone(),
            });
        }
        // Numbers and words are always values.
        let ports = serde_json::to_value(ports).unwrap_or_default();
        arguments.insert(PORT_MAPPINGS.to_owned(), ports);
        Ok(arguments)
    }
}

/// Files in `directory` with one of these extensions, by name; none: there is no directory.
fn files(directory: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut paths: Vec<_> = entries.map(|entry| entry.path()).collect();
    paths.retain(|path| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| extensions.contains(&extension))
    });
    paths.sort();
    paths
}

fn read_json(path: &Path) -> Result<Value, CniError> {
    let fault = |fault: String| CniError::Config {
        path: path.to_owned(),
        fault,
    };
    let text = fs::read_to_string(path).map_err(|e| fault(format!("cannot be read: {e}")))?;
    serde_json::from_str(&text).map_err(|error| fault(error.to_string()))
}

fn is_plain(name: &str) -> bool {
    name.chars()
        .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

/// 1.1 allows the words as text, too.
fn flag(source: &Value, field: &str) -> bool {
    match source.get(field) {
        Some(Value::Bool(flag)) => *flag,
        Some(Value::String(word)) => word.eq_ignore_ascii_case("true"),
        _ => false,
    }
}

/// The newest version that the configuration is written in (`cniVersion`, and since 1.1 `cniVersions`) and that is
/// known here.
fn version(source: &Value) -> String {
    let several = source.get("cniVersions").and_then(Value::as_array);
    let all = several
        .into_iter()
        .flatten()
        .chain(source.get("cniVersion"));
    let known = all
        .filter_map(Value::as_str)
        .filter(|version| numbers(version) <= numbers(NEWEST));
    let newest = known.max_by_key(|version| numbers(version));
    let only = source.get("cniVersion").and_then(Value::as_str);
    newest.or(only).unwrap_or("0.2.0").to_owned()
}

fn numbers(version: &str) -> Vec<u32> {
    let parts = version.split('.').map(|part| part.parse().unwrap_or(0));
    parts.collect()
}

fn plugin(value: Value) -> Result<PluginConfig, String> {
    let Value::Object(config) = value else {
        return Err("a plug-in's configuration is no object".into());
    };
    let kind = config.get("type").and_then(Value::as_str);
    let kind = kind
        .ok_or("a plug-in's configuration has no `type`")?
        .to_owned();
    if kind.is_empty() || kind.contains('/') || kind.starts_with('.') {
        return Err(format!(
            "a plug-in's `type` is {kind:?}; it is the name of a program"
        ));
    }
    Ok(PluginConfig { kind, config })
}

/// A port of the host that leads to one of the pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port on the host.
    pub host_port: u16,
    /// Port of the pod.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// The host's address; absent: all of them.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(text: &str) -> Result<NetworkConfig, String> {
        NetworkConfig::parse(text, Path::new("/x.conflist")).map_err(|e| e.to_string())
    }

    #[test]
    fn the_shipped_configuration_is_one() {
        let shipped = NetworkConfig::shipped().unwrap();
        let kinds: Vec<_> = shipped.plugins.iter().map(PluginConfig::kind).collect();
        assert_eq!(kinds, ["bridge", "portmap", "firewall"]);
        let port = PortMapping {
            host_port: 8080,
            container_port: 80,
            protocol: "tcp".into(),
            host_ip: None,
        };
        let arguments = shipped.port_mappings(&[port]).unwrap();
        // As values: the order of fields depends on what else is built with serde_json.
        let mapping = json!({ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" });
        assert_eq!(
            serde_json::to_value(&arguments).unwrap(),
            json!({ "portMappings": [mapping] })
        );
    }

    #[test]
    fn a_single_plugin_is_a_list_of_one() {
        let one = parse(r#"{"cniVersion":"1.1.0","name":"n","type":"ptp"}"#).unwrap();
        assert_eq!(one.plugins.len(), 1);
        assert!(one.has_check() && one.has_gc());
        let old = parse(r#"{"cniVersion":"0.3.1","name":"n","type":"ptp"}"#).unwrap();
        assert!(!old.has_check() && !old.has_gc());
        let mute = r#"{"cniVersion":"1.1.0","name":"n","plugins":[{"type":"a"}],"disableCheck":true,"disableGC":"true"}"#;
        let mute = parse(mute).unwrap();
        assert!(!mute.has_check() && !mute.has_gc());
    }

    #[test]
    fn what_is_wrong_is_said_with_the_file() {
        for (text, words) in [
            ("{", "EOF"),
            ("{}", "has no `name`"),
            (r#"{"name":"../x","type":"a"}"#, "`name` is"),
            (r#"{"name":"n"}"#, "has no `type`"),
            (r#"{"name":"n","plugins":[]}"#, "is empty"),
            (r#"{"name":"n","plugins":{}}"#, "is no list"),
            (
                r#"{"name":"n","plugins":[{"type":"../../bin/sh"}]}"#,
                "name of a program",
            ),
        ] {
            let error = parse(text).unwrap_err();
            assert!(
                error.contains(words) && error.contains("/x.conflist"),
                "{error}"
            );
        }
        let no_ports = parse(r#"{"name":"n","type":"ptp"}"#).unwrap();
        let port = PortMapping {
            host_port: 1,
            container_port: 1,
            protocol: "tcp".into(),
            host_ip: None,
        };
        let error = no_ports.port_mappings(&[port]).unwrap_err().to_string();
        assert!(error.contains("publishes no ports"), "{error}");
    }

    #[test]
    fn the_newest_known_version_counts() {
        for (text, version) in [
            (r#"{"name":"n","type":"a"}"#, "0.2.0"),
            (
                r#"{"name":"n","type":"a","cniVersion":"1.0.0","cniVersions":["0.4.0","1.1.0","9.0.0"]}"#,
                "1.1.0",
            ),
            (
                r#"{"name":"n","type":"a","cniVersions":["0.3.1","0.10.0"]}"#,
                "0.10.0",
            ),
            (r#"{"name":"n","type":"a","cniVersion":"9.0.0"}"#, "9.0.0"),
        ] {
            assert_eq!(parse(text).unwrap().version, version, "{text}");
        }
    }

    #[test]
    fn plugins_may_be_files_of_their_own() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, text).unwrap();
            path
        };
        write("n/20-b.conf", r#"{"type":"b"}"#);
        write("n/10-a.conf", r#"{"type":"a"}"#);
        write("n/readme.json", "no plug-in");
        let kinds = |text: &str| {
            let path = write("n.conflist", text);
            NetworkConfig::load(&path).map(|config| {
                // What is recorded has them all: DEL must not depend on what becomes of the files.
                let again = NetworkConfig::from_value(config.source().clone(), &path).unwrap();
                assert_eq!(again.plugins, config.plugins);
                let kinds = config.plugins.iter().map(|plugin| plugin.kind().to_owned());
                kinds.collect::<Vec<_>>().join(" ")
            })
        };
        assert_eq!(
            kinds(r#"{"name":"n","plugins":[{"type":"x"}]}"#).unwrap(),
            "x a b"
        );
        assert_eq!(kinds(r#"{"name":"n"}"#).unwrap(), "a b");
        let alone = r#"{"name":"n","plugins":[{"type":"x"}],"loadOnlyInlinedPlugins":true}"#;
        assert_eq!(kinds(alone).unwrap(), "x");
        assert_eq!(kinds(r#"{"name":"n","type":"x"}"#).unwrap(), "x");
        assert!(kinds(r#"{"name":"n","loadOnlyInlinedPlugins":"true"}"#).is_err());
        assert!(kinds(r#"{"name":"../n"}"#).is_err());
        write("n/30-c.conf", "{");
        let error = kinds(r#"{"name":"n"}"#).unwrap_err().to_string();
        assert!(error.contains("n/30-c.conf"), "{error}");
    }

    #[test]
    fn sysctls_are_the_networks() {
        let config = |sysctl: &str| {
            let text = format!(
                r#"{{"name":"n","plugins":[{{"type":"ptp"}},{{"type":"tuning","sysctl":{sysctl}}}]}}"#
            );
            parse(&text)
                .unwrap()
                .sysctls("eth0")
                .map_err(|e| e.to_string())
        };
        let given = r#"{"net.core.somaxconn":"500","net/ipv4/conf/IFNAME/arp_filter":"1"}"#;
        let expected = [
            ("net/core/somaxconn", "500"),
            ("net/ipv4/conf/eth0/arp_filter", "1"),
        ];
        let expected = expected.map(|(path, value)| (path.to_owned(), value.to_owned()));
        assert_eq!(config(given), Ok(BTreeMap::from(expected)));
        for wrong in [
            r#"{"kernel.panic":"1"}"#,
            r#"{"net/../kernel/panic":"1"}"#,
            r#"{"net..core":"1"}"#,
            r#"{"net.core.somaxconn":500}"#,
        ] {
            assert!(
                config(wrong).unwrap_err().contains("the sysctl `"),
                "{wrong}"
            );
        }
        assert!(
            parse(r#"{"name":"n","type":"ptp"}"#)
                .unwrap()
                .sysctls("eth0")
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn the_first_file_counts() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(NetworkConfig::first_in(directory.path()).unwrap(), None);
        assert_eq!(
            NetworkConfig::first_in(&directory.path().join("absent")).unwrap(),
            None
        );
        let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
        write("00-readme.txt", "no configuration");
        write("20-b.conf", r#"{"name":"b","type":"ptp"}"#);
        write(
            "10-a.conflist",
            r#"{"name":"a","plugins":[{"type":"ptp"}]}"#,
        );
        let first = NetworkConfig::first_in(directory.path()).unwrap().unwrap();
        assert_eq!(first.name, "a");
    }
}
