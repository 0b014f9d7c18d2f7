//! OCI image layouts: `index.json` → (an image index →) an image manifest → the configuration.
#![forbid(unsafe_code)]

use oci_spec::image::{Arch, Descriptor, ImageIndex, ImageManifest, MediaType, Os};

use super::config::ConfigFile;
use super::files::Files;
use super::{Found, MAX_LAYERS, SourceError, SourceLayer};
use crate::image::digest::Digest;
use crate::image::layer::stream::Expected;

/// How deep indices may be nested.
const MAX_DEPTH: usize = 4;
/// Annotations with an image's name, the more complete first: containerd's and OCI's.
const NAME_ANNOTATIONS: [&str; 2] = [
    "io.containerd.image.name",
    "org.opencontainers.image.ref.name",
];
/// Docker's name for an image index.
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
/// Docker's name for an image manifest.
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

/// Finds the image of `tag`, or the only one, for linux/amd64.
pub(super) fn resolve(files: &Files, tag: Option<&str>) -> Result<Found, SourceError> {
    let index: ImageIndex = files.parse("index.json", &files.json("index.json")?)?;
    let chosen = choose(files, index.manifests(), tag)?;
    let reference = name(chosen).map(str::to_owned);
    let mut descriptor = chosen.clone();
    for _ in 0..MAX_DEPTH {
        let digest = files.digest("index.json", descriptor.digest().as_ref())?;
        let path = blob(digest);
        let bytes = files.verified_json(&path, digest)?;
        if is_index(descriptor.media_type()) {
            let index: ImageIndex = files.parse(&path, &bytes)?;
            descriptor = choose(files, index.manifests(), None)?.clone();
            continue;
        }
        let manifest: ImageManifest = files.parse(&path, &bytes)?;
        return image(files, digest, reference, &manifest);
    }
    Err(files.unfit("has indices nested too deep"))
}

fn is_index(media_type: &MediaType) -> bool {
    matches!(media_type, MediaType::ImageIndex)
        || matches!(media_type, MediaType::Other(name) if name == DOCKER_LIST)
}

fn is_image(media_type: &MediaType) -> bool {
    matches!(media_type, MediaType::ImageManifest)
        || matches!(media_type, MediaType::Other(name) if name == DOCKER_MANIFEST)
}

/// The one descriptor with the tag, if one is given, and for this platform, as far as they say.
fn choose<'a>(
    files: &Files,
    descriptors: &'a [Descriptor],
    tag: Option<&str>,
) -> Result<&'a Descriptor, SourceError> {
    let tagged = descriptors
        .iter()
        .filter(|descriptor| match (tag, name(descriptor)) {
            (None, _) => true,
            (Some(tag), Some(name)) => name == tag || name.ends_with(&format!(":{tag}")),
            (Some(_), None) => false,
        });
    let candidates: Vec<_> = tagged
        .filter(|descriptor| {
            let kind = descriptor.media_type();
            (is_index(kind) || is_image(kind)) && runs_here(descriptor)
        })
        .collect();
    match candidates[..] {
        [] => Err(files.unfit(match tag {
            Some(tag) => format!("has nothing with the tag `{tag}` for linux/amd64"),
            None => "has nothing for linux/amd64".to_owned(),
        })),
        [one] => Ok(one),
        // The same platform twice: variants. The plain one runs everywhere.
        [first, ..] if candidates.iter().all(|c| name(c) == name(first)) => {
            let plain = |c: &&&Descriptor| {
                c.platform()
                    .as_ref()
                    .is_none_or(|platform| platform.variant().is_none())
            };
            Ok(candidates.iter().find(plain).unwrap_or(&first))
        }
        _ => {
            let tags: Vec<_> = candidates.iter().filter_map(|c| name(c)).collect();
            Err(files.unfit(format!(
                "holds several images: write a colon and a tag after the path, one of {}",
                tags.join(", ")
            )))
        }
    }
}

fn runs_here(descriptor: &Descriptor) -> bool {
    descriptor.platform().as_ref().is_none_or(|platform| {
        matches!(platform.os(), Os::Linux) && matches!(platform.architecture(), Arch::Amd64)
    })
}

fn name(descriptor: &Descriptor) -> Option<&str> {
    let annotations = descriptor.annotations().as_ref()?;
    NAME_ANNOTATIONS
        .iter()
        .find_map(|key| annotations.get(*key))
        .map(String::as_str)
}

fn blob(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn image(
    files: &Files,
    digest: Digest,
    reference: Option<String>,
    manifest: &ImageManifest,
) -> Result<Found, SourceError> {
    let manifest_name = blob(digest);
    let config_digest = files.digest(&manifest_name, manifest.config().digest().as_ref())?;
    let config_name = blob(config_digest);
    let bytes = files.verified_json(&config_name, config_digest)?;
    let config: ConfigFile = files.parse(&config_name, &bytes)?;
    if (config.os.as_str(), config.architecture.as_str()) != ("linux", "amd64") {
        let (os, architecture) = (&config.os, &config.architecture);
        return Err(files.unfit(format!("is for {os}/{architecture}; Cube runs linux/amd64")));
    }
    let (layers, diff_ids) = (manifest.layers(), &config.rootfs.diff_ids);
    if layers.len() != diff_ids.len() || layers.len() > MAX_LAYERS {
        let fault = format!(
            "it has {} layers, of 1,000 at most, and its configuration has {}",
            layers.len(),
            diff_ids.len()
        );
        return Err(files.malformed(&manifest_name, fault));
    }
    let layers = layers.iter().zip(diff_ids).map(|(descriptor, diff_id)| {
        check_layer_type(files, descriptor.media_type())?;
        let digest = files.digest(&manifest_name, descriptor.digest().as_ref())?;
        let diff_id = files.digest(&config_name, diff_id)?;
        let expected = Expected {
            blob: Some(digest),
            size: Some(descriptor.size()),
            diff_id,
        };
        Ok(SourceLayer {
            name: blob(digest),
            expected,
        })
    });
    let layers = layers.collect::<Result<_, _>>()?;
    Ok(Found {
        digest,
        reference,
        config,
        layers,
    })
}

/// Compression is told from the bytes; what cannot be a tar at all is refused by its type.
fn check_layer_type(files: &Files, media_type: &MediaType) -> Result<(), SourceError> {
    let text = media_type.to_string();
    let is_tar = [".tar", ".tar+gzip", ".tar+zstd", ".tar.gzip", ".tar.zstd"]
        .iter()
        .any(|end| text.ends_with(end));
    match is_tar {
        true => Ok(()),
        false => Err(files.unfit(format!("has a layer of the type `{text}`, which is no tar"))),
    }
}
