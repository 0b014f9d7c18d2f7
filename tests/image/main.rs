//! The image path: archives in, EROFS disks out, read back by a reader of the tests' own and checked by
//! `fsck.erofs` (package erofs-utils).
#![forbid(unsafe_code)]

#[path = "../archive/mod.rs"]
mod archive;

mod erofs_reader;
mod formats;
mod hostile;
mod merge;
mod place;
mod real;
mod store;
mod trees;
