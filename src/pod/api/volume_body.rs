//! Bodies about volumes and the files in them.
#![forbid(unsafe_code)]

use std::fmt;

use serde::{Deserialize, Serialize};

use super::body::DiskFile;

/// A volume to make in a running pod.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Unique in the pod: 1 to 63 letters, digits, `-`, `_`, `.`, the first a letter or digit.
    pub name: String,
    /// What it is.
    pub source: NewVolume,
}

/// Where a volume's content is.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NewVolume {
    /// A tmpfs in the guest.
    Memory {
        /// Its size in bytes; absent: half of the guest's memory.
        #[serde(default)]
        size_bytes: Option<u64>,
    },
    /// The file system on a disk.
    Disk {
        /// The disk.
        file: DiskFile,
        /// `ext4` or `erofs`.
        file_system: String,
        /// Permission bits that its root directory gets; absent: those it has.
        #[serde(default)]
        root_mode: Option<u32>,
        /// Mount it read-only, and attach the disk so.
        #[serde(default)]
        read_only: bool,
    },
    /// A disk that nothing mounts: containers have it as a device, by the serial that the answer tells.
    Block {
        /// The disk.
        file: DiskFile,
        /// Attach it read-only.
        #[serde(default)]
        read_only: bool,
    },
    /// Files that are pushed through the API.
    Files {},
    /// A directory of an NFS server, reached through the pod's network.
    Nfs {
        /// IPv4 or IPv6 address.
        server: String,
        /// Absolute path on it.
        path: String,
        /// Mount options as of nfs(5), comma-separated.
        #[serde(default)]
        options: String,
        /// Mount it read-only.
        #[serde(default)]
        read_only: bool,
    },
}

/// Where a volume is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VolumeState {
    /// It is being made.
    Creating,
    /// Containers can have it.
    Ready,
    /// It is being taken away.
    Removing,
}

/// A volume as the API shows it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// Its name.
    pub name: String,
    /// `memory`, `disk`, `block`, `files` or `nfs`.
    pub kind: String,
    /// Where it is.
    pub state: VolumeState,
    /// The serial of its disk, for a container's `devices`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
}

/// The whole new content of a volume of files.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutFiles {
    /// The files.
    pub files: Vec<PutFile>,
}

/// A file of a set.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PutFile {
    /// Relative path; no empty, `.` or `..` component, none that begins with `..`.
    pub path: String,
    /// Permission bits.
    #[serde(default = "readable")]
    pub mode: u32,
    /// Owner.
    #[serde(default)]
    pub uid: u32,
    /// Group.
    #[serde(default)]
    pub gid: u32,
    /// What is in it.
    pub content: Content,
}

fn readable() -> u32 {
    0o644
}

/// The content of a file. `Debug` does not show it: it may be a Secret.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Content {
    /// Text.
    Text(String),
    /// Any bytes (RFC 4648, section 4, with padding).
    Base64(#[serde(with = "base64_text")] Vec<u8>),
}

impl Content {
    /// Its bytes.
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Text(text) => text.as_bytes(),
            Self::Base64(bytes) => bytes,
        }
    }
}

impl From<Vec<u8>> for Content {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Base64(bytes)
    }
}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "<{} bytes>", self.bytes().len())
    }
}

mod base64_text {
    use base64::Engine;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = Vec<u8>;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("base64")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<u8>, E> {
                // Not the decoder's sentence: it quotes a byte.
                STANDARD
                    .decode(text)
                    .map_err(|_| E::custom("it is not base64"))
            }
        }
        from.deserialize_str(Text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_text_or_base64_and_never_shown() {
        let text = r#"{"files": [{"path": "a", "content": {"text": "hunter2"}},
            {"path": "b", "mode": 256, "content": {"base64": "AP8="}}]}"#;
        let set: PutFiles = serde_json::from_str(text).unwrap();
        assert_eq!(set.files[0].content.bytes(), b"hunter2");
        assert_eq!((set.files[0].mode, set.files[1].mode), (0o644, 0o400));
        assert_eq!(set.files[1].content.bytes(), [0, 255]);
        assert!(!format!("{set:?}").contains("hunter2"));
        let again = serde_json::to_string(&set).unwrap();
        let again: PutFiles = serde_json::from_str(&again).unwrap();
        assert_eq!(again.files[1].content, set.files[1].content);
        for wrong in ["{\"base64\": \"A\"}", "{\"hex\": \"00\"}", "\"text\"", "{}"] {
            let text = format!("{{\"files\": [{{\"path\": \"a\", \"content\": {wrong}}}]}}");
            assert!(serde_json::from_str::<PutFiles>(&text).is_err(), "{wrong}");
        }
    }
}
