//! The endpoint as a guest with a whole TCP stack sees it: many connections at once.

use std::collections::VecDeque;
use std::time::Duration;

use serde_json::json;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{Socket, SocketBuffer, State};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr};

use super::endpoint::MAX_FRAME;
use super::tests::{ADDRESS, GUEST, GUEST_MAC, body, endpoint};
use super::*;

/// A guest with a TCP stack of its own.
struct Linux {
    endpoint: Endpoint,
    interface: Interface,
    sockets: SocketSet<'static>,
    link: Link,
    now: Duration,
}

#[derive(Default)]
struct Link {
    to_guest: VecDeque<Vec<u8>>,
    from_guest: Vec<Vec<u8>>,
}

struct Frame(Vec<u8>);
impl RxToken for Frame {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}
struct Out<'a>(&'a mut Vec<Vec<u8>>);
impl TxToken for Out<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        self.0.push(vec![0; length]);
        f(self.0.last_mut().unwrap())
    }
}
impl Device for Link {
    type RxToken<'a> = Frame;
    type TxToken<'a> = Out<'a>;
    fn receive(&mut self, _: Instant) -> Option<(Frame, Out<'_>)> {
        Some((Frame(self.to_guest.pop_front()?), Out(&mut self.from_guest)))
    }
    fn transmit(&mut self, _: Instant) -> Option<Out<'_>> {
        Some(Out(&mut self.from_guest))
    }
    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        (capabilities.medium, capabilities.max_transmission_unit) = (Medium::Ethernet, MAX_FRAME);
        capabilities
    }
}

impl Linux {
    fn new(endpoint: Endpoint) -> Self {
        let mut link = Link::default();
        let mut interface = Interface::new(Config::new(EthernetAddress(GUEST_MAC).into()), &mut link, Instant::ZERO);
        interface.update_ip_addrs(|addresses| addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(GUEST, 0))).unwrap());
        Self { endpoint, interface, sockets: SocketSet::new(Vec::new()), link, now: Duration::from_secs(1) }
    }

    fn open(&mut self, port: u16) -> SocketHandle {
        let buffer = || SocketBuffer::new(vec![0; 16 << 10]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.connect(self.interface.context(), (ADDRESS, 80), port).unwrap();
        self.sockets.add(socket)
    }

    /// Lets frames through in both directions until all is quiet, then the clock go on.
    fn step(&mut self) {
        let time = Instant::from_micros(self.now.as_micros() as i64);
        loop {
            self.interface.poll(time, &mut self.link, &mut self.sockets);
            let mut quiet = self.link.from_guest.is_empty();
            for mut frame in self.link.from_guest.drain(..) {
                assert!(self.endpoint.claims(&frame));
                self.endpoint.receive(&mut frame, self.now);
            }
            let mut buffer = [0; MAX_FRAME];
            while let Some(length) = self.endpoint.transmit(&mut buffer, self.now) {
                self.link.to_guest.push_back(buffer[..length].to_vec());
                quiet = false;
            }
            if quiet {
                break;
            }
        }
        self.now += Duration::from_millis(5);
    }
}

/// Sends `requests` at once, each on a connection of its own, and returns the bodies.
fn ask_in_parallel(linux: &mut Linux, requests: &[String]) -> Vec<String> {
    let handles: Vec<_> = (0..requests.len()).map(|index| linux.open(50_000 + index as u16)).collect();
    let mut unsent: Vec<_> = requests.iter().map(|request| request.as_bytes()).collect();
    let mut responses = vec![Vec::new(); requests.len()];
    let start = linux.now;
    while linux.now < start + Duration::from_secs(20) {
        linux.step();
        let mut open = false;
        for (index, handle) in handles.iter().enumerate() {
            let socket = linux.sockets.get_mut::<Socket<'_>>(*handle);
            if socket.can_send() && !unsent[index].is_empty() {
                let sent = socket.send_slice(unsent[index]).unwrap();
                unsent[index] = &unsent[index][sent..];
            }
            let mut buffer = [0; 16 << 10];
            while let Ok(count @ 1..) = socket.recv_slice(&mut buffer) {
                responses[index].extend(&buffer[..count]);
            }
            if socket.state() == State::CloseWait {
                socket.close();
            }
            open |= socket.is_open() && socket.state() != State::TimeWait;
        }
        if !open {
            return responses.iter().map(|response| body(response)).collect();
        }
    }
    panic!("not answered in time");
}

#[test]
fn a_hundred_requests_at_once_are_all_answered_and_leave_nothing_behind() {
    let mut linux = Linux::new(endpoint(json!({"a": "one", "big": "b".repeat(50_000)})));
    for path in ["/a", "/big"] {
        let requests = vec![format!("GET {path} HTTP/1.1\r\nConnection: close\r\n\r\n"); 100];
        let start = linux.now;
        let bodies = ask_in_parallel(&mut linux, &requests);
        assert!(bodies.iter().all(|body| body == "one" || body.len() == 50_000));
        assert!(linux.now - start < Duration::from_secs(1), "no one had to wait for a retransmission");
    }
    assert_eq!(linux.endpoint.delay(linux.now), None);
}

#[test]
fn documents_of_a_mebibyte_come_whole_though_few_are_held_at_once() {
    let value = json!({"a": "m".repeat(1 << 20)});
    let mut mmds = Mmds::new(value.to_string().len());
    mmds.store.put(value).unwrap();
    let mut linux = Linux::new(Endpoint::new(ADDRESS, Arc::new(Mutex::new(mmds))));
    let requests = vec!["GET /a HTTP/1.1\r\nConnection: close\r\n\r\n".to_owned(); 20];
    let bodies = ask_in_parallel(&mut linux, &requests);
    assert!(bodies.iter().all(|body| body.len() == 1 << 20));
}
