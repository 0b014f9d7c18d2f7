//! Images: from an OCI layout, an OCI archive or a Docker archive to what a guest mounts.
//!
//! ```text
//!  source ──▶ layer ──▶ store: layers/<diff id>/{data, tails, index}     once per layer, content shared
//!  (verified)  (tar)                     │ index
//!                                        ▼
//!                                      tree ──▶ erofs ──▶ metadata/<digest>.erofs     once per image
//!
//!  the guest's disk = metadata blob ++ data blob of each layer that is used
//! ```
//!
//! Nothing is mounted, unpacked or run, and no privilege is needed; memory grows with the number of
//! files, never with their contents. All of it is synchronous and runs in the calling thread and one
//! decompressing thread per import.
#![forbid(unsafe_code)]

pub mod digest;
pub mod erofs;
pub mod layer;
pub mod source;
pub mod store;
pub mod tar;
pub mod tree;
pub mod tree_digest;
pub mod writable;

pub use digest::Digest;
pub use source::{ImageConfig, SourceError};
pub use store::{ImageRecord, ImportProgress, NoProgress, Removed, Store, StoreError};
pub use writable::{WritableError, WritableTemplates};
