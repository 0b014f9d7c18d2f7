//! Writes OCI layouts around layers.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;

use cube::image::Digest;
use serde_json::{Value, json};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

pub(crate) fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::None => bytes.to_vec(),
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap(),
        Compression::Gzip => {
            let mut encoder =
                flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        }
    }
}

/// Writes blobs and remembers nothing else.
pub(crate) fn blob(path: &Path, bytes: &[u8]) -> Digest {
    let digest = Digest::of(bytes);
    let directory = path.join("blobs/sha256");
    fs::create_dir_all(&directory).unwrap();
    fs::write(directory.join(digest.hex()), bytes).unwrap();
    digest
}

pub(crate) fn config(diff_ids: &[Digest]) -> Value {
    json!({
        "architecture": "amd64", "os": "linux", "created": "2024-05-06T07:08:09Z",
        "config": { "Cmd": ["/bin/sh"], "Env": ["PATH=/bin"], "WorkingDir": "/srv" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
}

/// Copies the image of the layout `base` to a new layout, with further layers on top.
pub(crate) fn extend_layout(base: &Path, path: &Path, tars: &[Vec<u8>]) {
    fs::create_dir_all(path).unwrap();
    let copied = Command::new("cp")
        .arg("-r")
        .arg(base.join("blobs"))
        .arg(path)
        .status();
    assert!(copied.unwrap().success());
    let read = |file: &Path| -> Value { serde_json::from_slice(&fs::read(file).unwrap()).unwrap() };
    let blob_of = |descriptor: &Value| {
        let digest = descriptor["digest"].as_str().unwrap();
        path.join("blobs").join(digest.replace(':', "/"))
    };
    let manifest = read(&blob_of(&read(&base.join("index.json"))["manifests"][0]));
    let mut config = read(&blob_of(&manifest["config"]));
    let mut layers = manifest["layers"].as_array().unwrap().clone();
    for tar in tars {
        layers.push(descriptor(
            "application/vnd.oci.image.layer.v1.tar",
            path,
            tar,
        ));
        let diff_ids = config["rootfs"]["diff_ids"].as_array_mut().unwrap();
        diff_ids.push(json!(Digest::of(tar)));
    }
    write_manifest(path, &config, &layers);
}

/// Writes an OCI layout with one image, tagged `latest`.
pub(crate) fn write_layout(path: &Path, tars: &[Vec<u8>], compression: Compression) {
    let diff_ids: Vec<_> = tars.iter().map(|tar| Digest::of(tar)).collect();
    let kind = match compression {
        Compression::None => "",
        Compression::Gzip => "+gzip",
        Compression::Zstd => "+zstd",
    };
    let layers = tars.iter().map(|tar| {
        let bytes = compress(tar, compression);
        descriptor(
            &format!("application/vnd.oci.image.layer.v1.tar{kind}"),
            path,
            &bytes,
        )
    });
    let layers: Vec<_> = layers.collect();
    write_manifest(path, &config(&diff_ids), &layers);
}

/// Writes a blob and gives its descriptor.
pub(crate) fn descriptor(media_type: &str, path: &Path, bytes: &[u8]) -> Value {
    json!({ "mediaType": media_type, "digest": blob(path, bytes), "size": bytes.len() })
}

/// Writes configuration, manifest, index and `oci-layout`.
pub(crate) fn write_manifest(path: &Path, config: &Value, layers: &[Value]) {
    let config = config.to_string();
    let config = descriptor(
        "application/vnd.oci.image.config.v1+json",
        path,
        config.as_bytes(),
    );
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({ "schemaVersion": 2, "mediaType": kind, "config": config, "layers": layers });
    let mut manifest = descriptor(kind, path, manifest.to_string().as_bytes());
    manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    write_index(path, &[manifest]);
}

pub(crate) fn write_index(path: &Path, manifests: &[Value]) {
    let index = json!({ "schemaVersion": 2, "manifests": manifests });
    fs::write(path.join("index.json"), index.to_string()).unwrap();
    fs::write(path.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
}

/// Packs a directory into a tar with GNU tar.
pub(crate) fn pack(directory: &Path, archive: &Path) {
    let status = Command::new("tar")
        .arg("-cf")
        .arg(archive)
        .arg("-C")
        .arg(directory)
        .arg(".")
        .status();
    assert!(status.unwrap().success());
}
