//! `cube-init` lies in the guest's memory as long as the pod lives: it goes there without symbols.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    if std::env::var("PROFILE").as_deref() == Ok("release") {
        println!("cargo::rustc-link-arg-bin=cube-init=-Wl,--strip-all");
    }
}
