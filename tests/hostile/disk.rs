//! virtio-blk on files: what a driver may do, and what it may not.
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use cube::vmm::spec::{DiskPart, DiskSpec, FileSource};
use cube::vmm::virtio::blk::{Backend, Blk, Disk, PartFile};

use crate::driver::{Buffer, Driver, DriverQueue, F_VERSION_1, status};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// Sectors of the test disk.
const SECTORS: u64 = 4096;

/// Bytes that differ from sector to sector and within one.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i / 512 * 31 + i % 251) as u8).collect()
}

pub fn part(file: &File) -> PartFile {
    PartFile {
        file: file.try_clone().unwrap(),
        path: "test.img".into(),
        size: None,
    }
}

fn file_with(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

/// A started driver of a disk over a file with the pattern.
struct DiskDriver {
    driver: Driver,
    queue: DriverQueue,
    file: File,
}

impl DiskDriver {
    fn new(read_only: bool) -> Self {
        let file = file_with(&pattern((SECTORS * 512) as usize));
        let disk = Disk::new("disk0", vec![part(&file)], read_only).unwrap();
        Self::start(disk, file)
    }

    fn start(disk: Disk, file: File) -> Self {
        let driver = Driver::new(Box::new(Blk::new(disk)));
        let queue = driver.start(&[128]).remove(0);
        Self {
            driver,
            queue,
            file,
        }
    }

    fn contents(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.file.rewind().unwrap();
        self.file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// A request with `told` behind the header and room for `asked` bytes: status, answer, used length.
    fn request(&mut self, kind: u32, sector: u64, told: &[u8], asked: u32) -> (u8, Vec<u8>, u32) {
        let mut readable = header(kind, sector);
        readable.extend(told);
        let out = self.driver.alloc_with(&readable);
        let back = self.driver.alloc(asked + 1);
        self.driver.memory_fill(back, asked + 1, 0xee);
        let buffers = [
            Buffer::read(out, readable.len() as u32),
            Buffer::write(back, asked + 1),
        ];
        let used = self.driver.call(0, &mut self.queue, &buffers);
        let mut answer = self.driver.bytes(back, asked as usize + 1);
        let status = answer.pop().unwrap();
        (status, answer, used)
    }

    fn status_of(&mut self, kind: u32, sector: u64, told: &[u8], asked: u32) -> u8 {
        self.request(kind, sector, told, asked).0
    }

    /// The disk still reads what is in its file.
    fn still_works(mut self) {
        self.driver.reset();
        self.queue = self.driver.start(&[128]).remove(0);
        let (status, answer, _) = self.request(IN, 0, &[], 4096);
        assert_eq!(status, OK);
        assert_eq!(answer, self.contents()[..4096]);
    }
}

pub fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    header.extend([0; 4]);
    header.extend(sector.to_le_bytes());
    header
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut range = sector.to_le_bytes().to_vec();
    range.extend(sectors.to_le_bytes());
    range.extend(flags.to_le_bytes());
    range
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    let mut disk = DiskDriver::new(false);
    assert_eq!(disk.driver.config::<8>(0), SECTORS.to_le_bytes());
    let bytes: Vec<u8> = (0..8192u32).map(|i| (i * 7) as u8).collect();
    let (status, _, used) = disk.request(OUT, 100, &bytes, 0);
    assert_eq!((status, used), (OK, 1));
    assert_eq!(disk.status_of(FLUSH, 0, &[], 0), OK);
    let (status, answer, used) = disk.request(IN, 99, &[], 512 * 18);
    assert_eq!((status, used), (OK, 512 * 18 + 1));
    let contents = disk.contents();
    assert_eq!(contents[100 * 512..][..8192], bytes);
    assert_eq!(answer, contents[99 * 512..][..512 * 18]);
    assert_eq!(contents.len() as u64, SECTORS * 512);
}

#[test]
fn the_way_a_request_is_cut_into_descriptors_means_nothing() {
    let mut disk = DiskDriver::new(false);
    // Header in three pieces, the last with data; data in odd pieces; the status in the last data piece.
    let bytes = pattern(1024 + 512);
    let mut readable = header(OUT, 8);
    readable.extend(&bytes);
    let out = disk.driver.alloc_with(&readable);
    let status = disk.driver.alloc(1);
    let cuts = [0, 3, 8, 100, 101, 1000, readable.len()];
    let mut buffers: Vec<_> = cuts
        .windows(2)
        .map(|cut| Buffer::read(out + cut[0] as u64, (cut[1] - cut[0]) as u32))
        .collect();
    buffers.push(Buffer::write(status, 1));
    assert_eq!(disk.driver.call(0, &mut disk.queue, &buffers), 1);
    assert_eq!(disk.contents()[8 * 512..][..1536], bytes);

    let head = disk.driver.alloc_with(&header(IN, 8));
    let back = disk.driver.alloc(2000);
    let buffers = [
        Buffer::read(head, 16),
        Buffer::write(back, 1),
        Buffer::write(back + 1, 1000),
        // In guest memory the rest lies elsewhere; 535 bytes of data and the status.
        Buffer::write(back + 1200, 536),
    ];
    assert_eq!(disk.driver.call(0, &mut disk.queue, &buffers), 1537);
    let mut answer = disk.driver.bytes(back, 1001);
    answer.extend(disk.driver.bytes(back + 1200, 536));
    assert_eq!(answer.pop(), Some(OK));
    assert_eq!(answer, bytes);
}

#[test]
fn a_transfer_of_as_many_segments_as_the_queue_holds_is_whole() {
    let mut disk = DiskDriver::new(true);
    let head = disk.driver.alloc_with(&header(IN, 0));
    let mut buffers = vec![Buffer::read(head, 16)];
    let data: Vec<u64> = (0..126).map(|_| disk.driver.alloc(4096)).collect();
    buffers.extend(data.iter().map(|at| Buffer::write(*at, 4096)));
    let status = disk.driver.alloc(1);
    buffers.push(Buffer::write(status, 1));
    disk.driver.call(0, &mut disk.queue, &buffers);
    let answer: Vec<u8> = data
        .iter()
        .flat_map(|at| disk.driver.bytes(*at, 4096))
        .collect();
    assert_eq!(answer, disk.contents()[..126 * 4096]);
}

#[test]
fn the_serial_is_twenty_bytes_padded_with_zeroes() {
    let mut disk = DiskDriver::new(true);
    let (status, answer, used) = disk.request(GET_ID, 0, &[], 20);
    assert_eq!((status, used), (OK, 21));
    assert_eq!(answer, b"disk0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    let (status, answer, _) = disk.request(GET_ID, 0, &[], 3);
    assert_eq!((status, answer), (OK, b"dis".to_vec()));
}

#[test]
fn discarded_space_is_given_back() {
    let mut disk = DiskDriver::new(false);
    let before = disk.file.metadata().unwrap().blocks();
    let mut ranges = range(0, 1024, 0);
    ranges.extend(range(2048, 1024, 0));
    assert_eq!(disk.status_of(DISCARD, 0, &ranges, 0), OK);
    let contents = disk.contents();
    assert!(contents[..1024 * 512].iter().all(|byte| *byte == 0));
    assert_eq!(
        contents[1024 * 512..2048 * 512],
        pattern(4096 * 512)[1024 * 512..2048 * 512]
    );
    assert!(disk.file.metadata().unwrap().blocks() < before);
    assert_eq!(contents.len() as u64, SECTORS * 512);
}

#[test]
fn zeroes_are_written_with_and_without_unmap() {
    for unmap in [0, 1] {
        let mut disk = DiskDriver::new(false);
        // Not aligned to anything but sectors.
        assert_eq!(
            disk.status_of(WRITE_ZEROES, 0, &range(3, 777, unmap), 0),
            OK
        );
        let mut expected = pattern((SECTORS * 512) as usize);
        expected[3 * 512..780 * 512].fill(0);
        assert!(disk.contents() == expected);
        disk.still_works();
    }
}

#[test]
fn malformed_ranges_are_refused() {
    let mut disk = DiskDriver::new(false);
    let before = disk.contents();
    for (kind, told, expected) in [
        (DISCARD, range(SECTORS, 1, 0), IOERR),
        (DISCARD, range(u64::MAX, u32::MAX, 0), IOERR),
        (DISCARD, range(0, u32::MAX, 0), IOERR),
        (DISCARD, range(0, 8, 1), UNSUPP),
        (DISCARD, range(0, 8, 0)[..15].to_vec(), IOERR),
        (DISCARD, Vec::new(), IOERR),
        (DISCARD, range(0, 8, 0).repeat(17), IOERR),
        (WRITE_ZEROES, range(0, 8, 2), UNSUPP),
        (WRITE_ZEROES, range(SECTORS - 1, 2, 0), IOERR),
        (WRITE_ZEROES, range(0, 8, 0).repeat(2), IOERR),
        (WRITE_ZEROES, range(1 << 55, 8, 0), IOERR),
    ] {
        let status = disk.status_of(kind, 0, &told, 0);
        assert_eq!(status, expected, "type {kind} with {told:?}");
    }
    assert!(disk.contents() == before);
    disk.still_works();
}

#[test]
fn sectors_beyond_the_end_are_refused_and_nothing_is_written() {
    let mut disk = DiskDriver::new(false);
    let before = disk.contents();
    let data = vec![0xaa; 1024];
    let sectors = [
        SECTORS - 1,
        SECTORS,
        u64::MAX,
        u64::MAX / 512,
        u64::MAX / 512 + 1,
        1 << 63,
    ];
    for sector in sectors {
        assert_eq!(disk.status_of(IN, sector, &[], 1024), IOERR, "{sector}");
        assert_eq!(disk.status_of(OUT, sector, &data, 0), IOERR, "{sector}");
    }
    // Not whole sectors.
    assert_eq!(disk.status_of(IN, 0, &[], 511), IOERR);
    assert_eq!(disk.status_of(OUT, 0, &data[..513], 0), IOERR);
    // Data in the wrong direction.
    assert_eq!(disk.status_of(IN, 0, &data, 512), IOERR);
    assert_eq!(disk.status_of(OUT, 0, &data, 512), IOERR);
    assert_eq!(disk.status_of(FLUSH, 0, &[], 512), IOERR);
    assert!(disk.contents() == before);
    assert_eq!(disk.driver.counters.snapshot().faults, 17);
    disk.still_works();
}

#[test]
fn a_read_only_disk_is_not_changed() {
    let mut disk = DiskDriver::new(true);
    let before = disk.contents();
    assert_ne!(disk.driver.offered_features() & (1 << 5), 0);
    assert_eq!(disk.status_of(OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(disk.status_of(DISCARD, 0, &range(0, 8, 0), 0), IOERR);
    assert_eq!(disk.status_of(WRITE_ZEROES, 0, &range(0, 8, 0), 0), IOERR);
    assert!(disk.contents() == before);
    disk.still_works();
}

#[test]
fn unknown_types_are_unsupported() {
    let mut disk = DiskDriver::new(false);
    for kind in [2, 3, 5, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(disk.status_of(kind, 0, &[], 512), UNSUPP, "type {kind}");
    }
    disk.still_works();
}

#[test]
fn a_short_header_fails_the_request_and_no_status_byte_the_device() {
    let mut disk = DiskDriver::new(false);
    let head = disk.driver.alloc_with(&header(IN, 0));
    let back = disk.driver.alloc(513);
    for len in [0, 1, 15] {
        disk.driver.memory_fill(back, 513, 0xee);
        let buffers = [Buffer::read(head, len), Buffer::write(back, 513)];
        assert_eq!(disk.driver.call(0, &mut disk.queue, &buffers), 1);
        assert_eq!(disk.driver.bytes(back + 512, 1), [IOERR]);
        assert_eq!(disk.driver.bytes(back, 512), [0xee; 512]);
    }
    // A header where the device writes is no header.
    let buffers = [Buffer::write(head, 16), Buffer::write(back, 513)];
    assert_eq!(disk.driver.call(0, &mut disk.queue, &buffers), 1);

    disk.queue.add(&[Buffer::read(head, 16)]);
    disk.driver.kick(0);
    disk.driver.wait_needs_reset();
    disk.still_works();
}

#[test]
fn a_file_cut_short_behind_the_vmm_s_back_fails_its_requests_alone() {
    let mut disk = DiskDriver::new(true);
    disk.file.set_len(8192).unwrap();
    assert_eq!(disk.status_of(IN, 8, &[], 8192), IOERR);
    assert_eq!(disk.driver.counters.snapshot().errors, 1);
    assert_eq!(disk.status_of(IN, 8, &[], 4096), OK);
    disk.still_works();
}

#[test]
fn a_driver_that_cannot_flush_writes_through() {
    let file = file_with(&pattern(8192));
    let disk = Disk::new("d", vec![part(&file)], false).unwrap();
    let mut driver = Driver::new(Box::new(Blk::new(disk)));
    let mut queue = driver.start_with(F_VERSION_1, &[16]).remove(0);
    let mut out = header(OUT, 0);
    out.extend([9; 512]);
    let out = driver.alloc_with(&out);
    let back = driver.alloc(1);
    let buffers = [Buffer::read(out, 528), Buffer::write(back, 1)];
    driver.call(0, &mut queue, &buffers);
    assert_eq!(driver.bytes(back, 1), [OK]);
    let mut written = [0; 512];
    file.read_exact_at(&mut written, 0).unwrap();
    assert_eq!(written, [9; 512]);
}

#[test]
fn parts_are_laid_end_to_end() {
    // Lengths that put several borders into one transfer.
    let lens = [4096, 8192, 4096, 12288, 512 * 7];
    let whole = pattern(lens.iter().sum());
    let mut rest = &whole[..];
    let mut parts = Vec::new();
    for len in lens {
        let (now, later) = rest.split_at(len);
        // Each file has more than it is said to give.
        let mut bytes = now.to_vec();
        bytes.extend([0xbd; 4096]);
        parts.push(PartFile {
            size: Some(len as u64),
            ..part(&file_with(&bytes))
        });
        rest = later;
    }
    let disk = Disk::new("image0", parts, true).unwrap();
    let mut disk = DiskDriver::start(disk, file_with(&whole));
    let sectors = whole.len() as u64 / 512;
    assert_eq!(disk.driver.config::<8>(0), sectors.to_le_bytes());
    for from in 0..sectors {
        for count in [1, 2, 9, 33] {
            disk.driver.free_buffers();
            let end = (from + count) * 512;
            let (status, answer, _) = disk.request(IN, from, &[], count as u32 * 512);
            if end <= whole.len() as u64 {
                assert_eq!(status, OK);
                assert!(answer == whole[from as usize * 512..end as usize]);
            } else {
                assert_eq!(status, IOERR);
            }
        }
    }
    disk.still_works();
}

#[test]
fn what_cannot_be_a_disk_is_refused_with_a_sentence() {
    let file = |len| file_with(&vec![1; len]);
    let said = |file: File, size| PartFile {
        size: Some(size),
        ..part(&file)
    };
    let read_only_file = {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(4096).unwrap();
        File::open(named.path()).unwrap()
    };
    let two = || vec![part(&file(4096)), part(&file(4096))];
    let refusals = [
        (
            Disk::new("d", vec![said(file(4096), 4097)], true),
            "fewer than the 4097",
        ),
        (Disk::new("d", vec![part(&file(0))], true), "is empty"),
        (
            Disk::new("d", vec![part(&file(700))], true),
            "not a multiple of 512",
        ),
        (
            Disk::new("d", vec![part(&file(512)), part(&file(512))], true),
            "not a multiple of 4096",
        ),
        (
            Disk::new("d", two(), false),
            "several parts and is writable",
        ),
        (Disk::new("d", Vec::new(), true), "no parts"),
        (Disk::new("", two(), true), "1 to 20"),
        (Disk::new("123456789012345678901", two(), true), "1 to 20"),
        (
            Disk::new("d", vec![part(&read_only_file)], false),
            "open for reading only",
        ),
        (
            Disk::new("d", vec![part(&File::open("/").unwrap())], true),
            "neither a regular file nor a block device",
        ),
        (
            Disk::new("d", vec![part(&File::open("/dev/null").unwrap())], true),
            "neither a regular file nor a block device",
        ),
    ];
    for (refused, expected) in refusals {
        let sentence = refused.unwrap_err().to_string();
        assert!(sentence.contains(expected), "{sentence}");
    }
}

#[test]
fn a_disk_is_opened_from_a_spec_or_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let image = directory.path().join("image");
    std::fs::write(&image, pattern(8192)).unwrap();
    let pipe = directory.path().join("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    let spec = |path: &std::path::Path, size, read_only| DiskSpec {
        serial: "d".into(),
        parts: vec![DiskPart {
            file: FileSource::Path(path.into()),
            size,
        }],
        read_only,
    };
    for read_only in [true, false] {
        let disk = Disk::open(&spec(&image, Some(4096), read_only)).unwrap();
        assert_eq!((disk.len(), disk.is_read_only()), (4096, read_only));
    }
    let missing = directory.path().join("missing");
    for (path, size, expected) in [
        (&missing, None, "missing"),
        (&pipe, None, "pipe is neither"),
        (
            &image,
            Some(8193),
            "image has 8192 bytes, fewer than the 8193",
        ),
    ] {
        let sentence = Disk::open(&spec(path, size, true)).unwrap_err().to_string();
        assert!(sentence.contains(expected), "{sentence}");
    }
}

#[test]
fn several_queues_are_served_when_the_driver_uses_one_or_all() {
    for used in [1, 4] {
        let file = file_with(&pattern(8192));
        let disk = Disk::new("d", vec![part(&file)], true).unwrap();
        let blk = Blk::with_backend("d".into(), disk, 4);
        let mut driver = Driver::new(Box::new(blk));
        assert_eq!(driver.config::<2>(34), [4, 0]);
        let mut queues = driver.start(&[16; 4][..used]);
        for (index, queue) in queues.iter_mut().enumerate() {
            let head = driver.alloc_with(&header(IN, index as u64));
            let back = driver.alloc(513);
            let buffers = [Buffer::read(head, 16), Buffer::write(back, 513)];
            driver.call(index as u32, queue, &buffers);
            assert!(driver.bytes(back, 512) == pattern(8192)[index * 512..][..512]);
        }
        assert_eq!(driver.status() & status::NEEDS_RESET, 0);
    }
}
