//! I/O between host descriptors and guest memory without a copy in between.
//!
//! `unsafe` lives here because the kernel is handed raw pointers into guest memory: the one thing that
//! cannot go through a Rust reference, since the guest writes to that memory at any time. The pointers
//! come from `vm-memory`'s slices, whose bounds were checked against the mapping, and the lifetime of
//! [`IoVecs`] keeps the mapping alive.
#![allow(unsafe_code)]
#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::indexing_slicing,
        clippy::panic,
        clippy::arithmetic_side_effects
    )
)]

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::{GuestMemory as GuestMemoryTrait, Permissions};

use super::GuestFault;
use super::chain::Segments;
use crate::vmm::memory::GuestMemory;

/// The most vectors that one call takes (Linux, `UIO_MAXIOV`).
const IOV_MAX: usize = 1024;

/// Stretches of guest memory, as the kernel's vectored calls want them.
pub struct IoVecs<'m> {
    list: Vec<libc::iovec>,
    /// Vectors before this one are finished.
    first: usize,
    _memory: PhantomData<&'m GuestMemory>,
}

impl<'m> IoVecs<'m> {
    /// The bytes `offset..offset + len` of `segments`.
    ///
    /// # Errors
    /// [`GuestFault::Request`] when the range goes beyond the segments.
    pub fn new(
        memory: &'m GuestMemory,
        segments: &Segments,
        offset: u32,
        len: u32,
    ) -> Result<Self, GuestFault> {
        let mut list = Vec::new();
        for segment in segments.range(offset, len)? {
            let slices = memory
                .get_slices(
                    segment.address,
                    segment.len as usize,
                    Permissions::ReadWrite,
                )
                .map_err(|_| GuestFault::Address)?;
            for slice in slices {
                let slice = slice.map_err(|_| GuestFault::Address)?;
                list.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(Self {
            list,
            first: 0,
            _memory: PhantomData,
        })
    }

    /// Bytes not yet transferred.
    pub fn remaining(&self) -> usize {
        let rest = self.list.get(self.first..).unwrap_or_default();
        rest.iter().map(|v| v.iov_len).sum()
    }

    /// Fills all of the memory from the file `fd`, from byte `at` on.
    ///
    /// # Errors
    /// The kernel's, or `UnexpectedEof` when the file is shorter.
    pub fn read_all_at(&mut self, fd: BorrowedFd<'_>, at: u64) -> io::Result<()> {
        self.transfer_all(at, io::ErrorKind::UnexpectedEof, |list, count, at| {
            // SAFETY: `list` points to `count` vectors of this object, each inside a mapping that the
            // borrow of guest memory keeps alive; only the kernel and the guest touch those bytes.
            unsafe { libc::preadv(fd.as_raw_fd(), list, count, at) }
        })
    }

    /// Writes all of the memory to the file `fd`, from byte `at` on.
    ///
    /// # Errors
    /// The kernel's, or `WriteZero` when the file takes no more.
    pub fn write_all_at(&mut self, fd: BorrowedFd<'_>, at: u64) -> io::Result<()> {
        self.transfer_all(at, io::ErrorKind::WriteZero, |list, count, at| {
            // SAFETY: as in `read_all_at`; the kernel only reads the bytes.
            unsafe { libc::pwritev(fd.as_raw_fd(), list, count, at) }
        })
    }

    /// Reads once from the stream `fd` into the memory: at most what is left, at least one byte, 0 at the
    /// end of the stream.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when `fd` is non-blocking and has nothing.
    pub fn read_some(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|list, count| {
            // SAFETY: as in `read_all_at`.
            unsafe { libc::readv(fd.as_raw_fd(), list, count) }
        })
    }

    /// Writes once from the memory to the stream `fd`.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when `fd` is non-blocking and takes nothing.
    pub fn write_some(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|list, count| {
            // SAFETY: as in `read_all_at`; the kernel only reads the bytes.
            unsafe { libc::writev(fd.as_raw_fd(), list, count) }
        })
    }

    /// Sends once from the memory to the socket `fd`; a closed peer is an error, never a signal.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when the socket is non-blocking and takes nothing.
    pub fn send_some(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|list, count| {
            // SAFETY: `msghdr` is plain data for which zeroes are a value: no name, no control.
            let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
            message.msg_iov = list.cast_mut();
            message.msg_iovlen = usize::try_from(count).unwrap_or_default();
            // SAFETY: `message` lives through the call; its vectors are as in `read_all_at`.
            unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) }
        })
    }

    /// Fills all of the memory with random bytes.
    ///
    /// # Errors
    /// The kernel's.
    pub fn fill_random(&mut self) -> io::Result<()> {
        while let Some(vector) = self.list.get(self.first).copied() {
            // SAFETY: the vector lies inside a mapping that the borrow of guest memory keeps alive.
            let n = unsafe { libc::getrandom(vector.iov_base, vector.iov_len, 0) };
            self.advance(check(n)?);
        }
        Ok(())
    }

    fn transfer_all(
        &mut self,
        mut at: u64,
        stuck: io::ErrorKind,
        call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
    ) -> io::Result<()> {
        while self.first < self.list.len() {
            let offset = libc::off_t::try_from(at).map_err(|_| io::ErrorKind::InvalidInput)?;
            match self.transfer(|list, count| call(list, count, offset)) {
                Ok(0) => return Err(stuck.into()),
                Ok(n) => at = at.saturating_add(n as u64),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn transfer(
        &mut self,
        call: impl FnOnce(*const libc::iovec, libc::c_int) -> isize,
    ) -> io::Result<usize> {
        let rest = self.list.get(self.first..).unwrap_or_default();
        let count = libc::c_int::try_from(rest.len().min(IOV_MAX)).unwrap_or_default();
        let n = check(call(rest.as_ptr(), count))?;
        self.advance(n);
        Ok(n)
    }

    /// Drops the first `n` bytes.
    fn advance(&mut self, mut n: usize) {
        while let Some(vector) = self.list.get_mut(self.first) {
            if n < vector.iov_len {
                vector.iov_base = vector.iov_base.wrapping_byte_add(n);
                vector.iov_len = vector.iov_len.saturating_sub(n);
                return;
            }
            n = n.saturating_sub(vector.iov_len);
            self.first = self.first.saturating_add(1);
        }
    }
}

/// A system call's answer as a count.
fn check(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
