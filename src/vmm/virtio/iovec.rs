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
        push_vectors(memory, segments, offset, len, &mut list)?;
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

    /// Receives once from the socket `fd` into the memory, without waiting: at most what is left, at least one byte, 0
    /// at the end of the stream.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when there is nothing.
    pub fn receive_some(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|list, count| {
            let mut message = message(list, count);
            // SAFETY: `message` lives through the call; its vectors are as in `read_all_at`.
            unsafe { libc::recvmsg(fd.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends once from the memory to the socket `fd`, without waiting; a closed peer is an error, never a signal.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when the socket takes nothing.
    pub fn send_some(&mut self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        self.transfer(|list, count| {
            let message = message(list, count);
            let flags = libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT;
            // SAFETY: `message` lives through the call; its vectors are as in `read_all_at`.
            unsafe { libc::sendmsg(fd.as_raw_fd(), &raw const message, flags) }
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

/// Bytes of the host followed by bytes of guest memory, written as one.
pub struct Gather<'m> {
    list: Vec<libc::iovec>,
    _lenders: PhantomData<(&'m GuestMemory, &'m [u8])>,
}

impl<'m> Gather<'m> {
    /// `prefix`, which stands for the first bytes of `segments`, and the rest of those.
    ///
    /// # Errors
    /// [`GuestFault::Request`] when the segments are shorter than the prefix.
    pub fn new(
        memory: &'m GuestMemory,
        prefix: &'m [u8],
        segments: &Segments,
    ) -> Result<Self, GuestFault> {
        let skip = u32::try_from(prefix.len()).map_err(|_| GuestFault::Request)?;
        let len = segments
            .len()
            .checked_sub(skip)
            .ok_or(GuestFault::Request)?;
        let mut list = Vec::with_capacity(segments.count().saturating_add(1));
        list.push(libc::iovec {
            iov_base: prefix.as_ptr().cast_mut().cast(),
            iov_len: prefix.len(),
        });
        push_vectors(memory, segments, skip, len, &mut list)?;
        Ok(Self {
            list,
            _lenders: PhantomData,
        })
    }

    /// Writes everything to `fd` in one call.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when `fd` is non-blocking and takes nothing.
    pub fn write(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        let count = libc::c_int::try_from(self.list.len().min(IOV_MAX)).unwrap_or_default();
        // SAFETY: the vectors are the prefix, whose borrow lives as long as this object, and stretches of a
        // mapping that the borrow of guest memory keeps alive; the kernel only reads them.
        check(unsafe { libc::writev(fd.as_raw_fd(), self.list.as_ptr(), count) })
    }
}

/// Guest memory that waits to be filled, over many calls: a queue of buffers.
pub struct ReceiveBuffers {
    /// Keeps the mappings alive that the vectors point into.
    memory: GuestMemory,
    list: Vec<libc::iovec>,
    /// Vectors before this one are gone.
    first: usize,
    /// One call's vectors; empty in between.
    call: Vec<libc::iovec>,
}

// SAFETY: the pointers lead into guest memory, which `memory` keeps mapped, at the same address in every
// thread of the process; nothing but the kernel follows them.
unsafe impl Send for ReceiveBuffers {}

impl ReceiveBuffers {
    /// No buffers yet; all will be in `memory`.
    pub fn new(memory: GuestMemory) -> Self {
        Self {
            memory,
            list: Vec::new(),
            first: 0,
            call: Vec::new(),
        }
    }

    /// Adds a buffer at the end; returns the number of vectors that it takes.
    ///
    /// # Errors
    /// [`GuestFault::Address`] when it is not in guest memory.
    pub fn push(&mut self, segments: &Segments) -> Result<usize, GuestFault> {
        // Amortised: what is gone is at least half of the list.
        if self.first >= self.list.len().div_ceil(2) {
            self.list.drain(..self.first.min(self.list.len()));
            self.first = 0;
        }
        let before = self.list.len();
        push_vectors(&self.memory, segments, 0, segments.len(), &mut self.list)?;
        Ok(self.list.len().saturating_sub(before))
    }

    /// Reads once from `fd`: the first bytes into `prefix`, those behind them into the buffers, at the place
    /// where they would be if the prefix were in the buffers too. What is longer than all buffers is cut, and
    /// the result is larger than they are.
    ///
    /// # Errors
    /// The kernel's; `WouldBlock` when `fd` is non-blocking and has nothing.
    pub fn read(&mut self, fd: BorrowedFd<'_>, prefix: &mut [u8]) -> io::Result<usize> {
        self.call.push(libc::iovec {
            iov_base: prefix.as_mut_ptr().cast(),
            iov_len: prefix.len(),
        });
        let mut skip = prefix.len();
        for vector in self.list.get(self.first..).unwrap_or_default() {
            let skipped = skip.min(vector.iov_len);
            skip = skip.saturating_sub(skipped);
            if skipped < vector.iov_len {
                self.call.push(libc::iovec {
                    iov_base: vector.iov_base.wrapping_byte_add(skipped),
                    iov_len: vector.iov_len.saturating_sub(skipped),
                });
            }
        }
        let mut beyond = 0u8;
        self.call.push(libc::iovec {
            iov_base: (&raw mut beyond).cast(),
            iov_len: 1,
        });
        let count = libc::c_int::try_from(self.call.len().min(IOV_MAX)).unwrap_or_default();
        // SAFETY: the first vector is `prefix`, borrowed exclusively for this call, the last one a local of
        // this function; the others lie inside mappings that `memory` keeps alive, and only the kernel and
        // the guest touch their bytes.
        let read = unsafe { libc::readv(fd.as_raw_fd(), self.call.as_ptr(), count) };
        let read = check(read);
        self.call.clear();
        read
    }

    /// Forgets the first vectors.
    pub fn drop_first(&mut self, vectors: usize) {
        self.first = self.first.saturating_add(vectors);
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.list.clear();
        self.first = 0;
    }
}

/// Appends the vectors of the bytes `offset..offset + len` of `segments`.
fn push_vectors(
    memory: &GuestMemory,
    segments: &Segments,
    offset: u32,
    len: u32,
    list: &mut Vec<libc::iovec>,
) -> Result<(), GuestFault> {
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
    Ok(())
}

/// A message of these vectors, with no name and no control data.
fn message(list: *const libc::iovec, count: libc::c_int) -> libc::msghdr {
    // SAFETY: `msghdr` is plain data for which zeroes are a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = list.cast_mut();
    message.msg_iovlen = usize::try_from(count).unwrap_or_default();
    message
}

/// A system call's answer as a count.
fn check(n: isize) -> io::Result<usize> {
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}
