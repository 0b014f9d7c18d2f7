//! The Container Network Interface, version 1.1 (and what came before, from 0.3.0 on): configurations, the
//! plug-ins' processes, their results.
//!
//! A configuration is a chain of plug-ins. ADD runs them in order, each with the result of the one before; DEL
//! in reverse, for all of them even after an ADD that failed half-way: a plug-in that failed may have left
//! something, too.

pub mod config;
pub mod plugin;
pub mod result;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};

use config::NetworkConfig;
use plugin::Invocation;
use result::AddResult;

/// How long a plug-in may take.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// A plug-in or a configuration is not what it should be.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// A configuration cannot be used.
    #[error("the CNI configuration {}: {fault}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        fault: String,
    },
    /// A plug-in failed, or did not behave like one.
    #[error("the CNI plug-in `{plugin}` ({command}, network `{network}`): {fault}")]
    Plugin {
        /// Its type.
        plugin: String,
        /// ADD, DEL, CHECK, GC or VERSION.
        command: &'static str,
        /// The network's name.
        network: String,
        /// Its own error text, or what was wrong with it.
        fault: String,
    },
    /// A host port was asked for, and no plug-in can do it.
    #[error(
        "the network `{network}` ({}) publishes no ports: none of its plug-ins has the capability `portMappings`",
        path.display()
    )]
    NoPortMappings {
        /// The network's name.
        network: String,
        /// Its configuration.
        path: PathBuf,
    },
}

/// Where plug-ins are and how long they may take.
#[derive(Debug, Clone)]
pub struct Plugins {
    /// Directories, in the order in which they are looked at.
    pub path: Vec<PathBuf>,
    /// How long one may take.
    pub deadline: Duration,
}

impl Default for Plugins {
    /// `CNI_PATH`, or where packages put plug-ins.
    fn default() -> Self {
        let path = match std::env::var_os("CNI_PATH").filter(|path| !path.is_empty()) {
            Some(path) => std::env::split_paths(&path).collect(),
            None => ["/opt/cni/bin", "/usr/lib/cni", "/usr/libexec/cni"]
                .map(PathBuf::from)
                .into(),
        };
        Self {
            path,
            deadline: DEADLINE,
        }
    }
}

/// One interface of one pod on one network.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint<'a> {
    /// The network.
    pub network: &'a NetworkConfig,
    /// The pod's id, unique on this host.
    pub container: &'a str,
    /// Path of its network namespace.
    pub namespace: &'a Path,
    /// Name of the interface in it.
    pub interface: &'a str,
    /// Arguments by capability (`runtimeConfig`).
    pub capabilities: &'a Map<String, Value>,
}

impl Plugins {
    /// Where the plug-in is.
    pub fn find(&self, plugin: &str) -> Option<PathBuf> {
        let mut places = self.path.iter().map(|directory| directory.join(plugin));
        places.find(|path| path.is_file())
    }

    /// Whether every plug-in of a network is there.
    ///
    /// # Errors
    /// The one that is not.
    pub fn require(&self, network: &NetworkConfig) -> Result<(), CniError> {
        let missing = network
            .plugins
            .iter()
            .find(|plugin| self.find(plugin.kind()).is_none());
        missing.map_or(Ok(()), |plugin| {
            Err(self.missing("ADD", plugin.kind(), network))
        })
    }

    fn missing(&self, command: &'static str, plugin: &str, network: &NetworkConfig) -> CniError {
        let places: Vec<_> = self
            .path
            .iter()
            .map(|path| path.display().to_string())
            .collect();
        CniError::Plugin {
            plugin: plugin.to_owned(),
            command,
            network: network.name.clone(),
            fault: format!(
                "it is not in {}; install it there, or set CNI_PATH to where it is",
                places.join(":")
            ),
        }
    }

    /// ADD: makes the interface. `note` is given the result so far after each plug-in, as DEL wants it. A chain
    /// that fails is for the caller to [`delete`](Plugins::delete).
    ///
    /// # Errors
    /// The plug-in that failed.
    pub fn add(
        &self,
        endpoint: Endpoint<'_>,
        mut note: impl FnMut(&Value),
    ) -> Result<AddResult, CniError> {
        let mut result = AddResult::default();
        let mut previous = None;
        for plugin in &endpoint.network.plugins {
            let config = configuration(endpoint, plugin, previous.as_ref());
            let output = self.call("ADD", endpoint, plugin.kind(), &config)?;
            let fault = |fault| CniError::Plugin {
                plugin: plugin.kind().to_owned(),
                command: "ADD",
                network: endpoint.network.name.clone(),
                fault,
            };
            let printed: Value = serde_json::from_slice(&output).map_err(|error| {
                let printed = plugin::excerpt(&output);
                fault(format!("it printed no result ({error}): {printed}"))
            })?;
            // Read before it is noted: what is malformed is nothing to give to other plug-ins.
            result = AddResult::parse(&printed).map_err(fault)?;
            note(previous.insert(printed));
        }
        Ok(result)
    }

    /// DEL: undoes ADD, as far as it came; `result` is the last that it noted. All plug-ins are asked, also after one
    /// fails.
    ///
    /// # Errors
    /// The first plug-in that failed.
    pub fn delete(&self, endpoint: Endpoint<'_>, result: Option<&Value>) -> Result<(), CniError> {
        let mut first = Ok(());
        for plugin in endpoint.network.plugins.iter().rev() {
            let config = configuration(endpoint, plugin, result);
            let deleted = self.call("DEL", endpoint, plugin.kind(), &config);
            first = first.and(deleted.map(drop));
        }
        first
    }

    /// CHECK: whether everything is as ADD left it. Networks older than 0.4.0 cannot say, nor those that say
    /// they cannot.
    ///
    /// # Errors
    /// The plug-in that finds something else.
    pub fn check(&self, endpoint: Endpoint<'_>, result: &Value) -> Result<(), CniError> {
        if !endpoint.network.has_check() {
            return Ok(());
        }
        for plugin in &endpoint.network.plugins {
            let config = configuration(endpoint, plugin, Some(result));
            self.call("CHECK", endpoint, plugin.kind(), &config)?;
        }
        Ok(())
    }

    /// GC: removes what belongs to none of `valid`, as (container, interface). Networks older than 1.1.0 have
    /// none.
    ///
    /// # Errors
    /// The first plug-in that failed; all are asked.
    pub fn collect_garbage(
        &self,
        network: &NetworkConfig,
        valid: &[(String, String)],
    ) -> Result<(), CniError> {
        if !network.has_gc() {
            return Ok(());
        }
        let valid = valid
            .iter()
            .map(|(container, interface)| json!({"containerID": container, "ifname": interface}));
        let valid = Value::Array(valid.collect());
        let mut first = Ok(());
        for plugin in &network.plugins {
            let mut config = plugin.config.clone();
            name(&mut config, network);
            config.insert("cni.dev/valid-attachments".to_owned(), valid.clone());
            let invocation = Invocation {
                command: "GC",
                plugin: plugin.kind(),
                network,
                variables: vec![],
            };
            let collected = plugin::run(self, &invocation, &Value::Object(config));
            first = first.and(collected.map(drop));
        }
        first
    }

    /// VERSION: the versions that a plug-in knows.
    ///
    /// # Errors
    /// It does not say.
    pub fn versions(&self, plugin: &str, network: &NetworkConfig) -> Result<Vec<String>, CniError> {
        let invocation = Invocation {
            command: "VERSION",
            plugin,
            network,
            variables: vec![],
        };
        let config = json!({"cniVersion": network.version});
        let output = plugin::run(self, &invocation, &config)?;
        let output: Value = serde_json::from_slice(&output).unwrap_or_default();
        let versions = output.get("supportedVersions").and_then(Value::as_array);
        let versions = versions.into_iter().flatten().filter_map(Value::as_str);
        Ok(versions.map(str::to_owned).collect())
    }

    fn call(
        &self,
        command: &'static str,
        endpoint: Endpoint<'_>,
        plugin: &str,
        config: &Value,
    ) -> Result<Vec<u8>, CniError> {
        let invocation = Invocation {
            command,
            plugin,
            network: endpoint.network,
            variables: vec![
                ("CNI_CONTAINERID", endpoint.container.into()),
                ("CNI_NETNS", endpoint.namespace.into()),
                ("CNI_IFNAME", endpoint.interface.into()),
            ],
        };
        let output = plugin::run(self, &invocation, config);
        output.map_err(|error| self.with_versions(error, plugin, endpoint.network))
    }

    /// Says which versions the plug-in knows, if that is what it complains about.
    fn with_versions(&self, error: CniError, plugin: &str, network: &NetworkConfig) -> CniError {
        match error {
            CniError::Plugin {
                plugin: name,
                command,
                network: of,
                fault,
            } if fault.contains(plugin::INCOMPATIBLE) => {
                let versions = self.versions(plugin, network).unwrap_or_default();
                let asked = &network.version;
                CniError::Plugin {
                    plugin: name,
                    command,
                    network: of,
                    fault: format!(
                        "{fault}; asked for {asked}, it knows {}",
                        versions.join(", ")
                    ),
                }
            }
            other => other,
        }
    }
}

fn name(config: &mut Map<String, Value>, network: &NetworkConfig) {
    config.insert("name".to_owned(), network.name.clone().into());
    config.insert("cniVersion".to_owned(), network.version.clone().into());
}

/// What a plug-in of a chain reads: its own configuration, the network's name and version, arguments for its
/// capabilities, the result so far.
fn configuration(
    endpoint: Endpoint<'_>,
    plugin: &config::PluginConfig,
    previous: Option<&Value>,
) -> Value {
    let mut config = plugin.config.clone();
    name(&mut config, endpoint.network);
    let mut arguments = Map::new();
    for (capability, argument) in endpoint.capabilities {
        if plugin.has_capability(capability) {
            arguments.insert(capability.clone(), argument.clone());
        }
    }
    if !arguments.is_empty() {
        config.insert("runtimeConfig".to_owned(), Value::Object(arguments));
    }
    if let Some(previous) = previous {
        config.insert("prevResult".to_owned(), previous.clone());
    }
    Value::Object(config)
}
