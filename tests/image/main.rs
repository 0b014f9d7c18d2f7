//! The image path: archives in, EROFS disks out, read back by a reader of the tests' own and checked by
//! `fsck.erofs` (package erofs-utils).
#![forbid(unsafe_code)]

mod erofs_reader;
mod formats;
mod hostile;
mod layout;
mod merge;
mod real;
mod store;
mod tar_builder;
mod trees;
