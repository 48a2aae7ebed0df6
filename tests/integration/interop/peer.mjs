// One js-libp2p node, driven by lines of JSON on standard input; one line of JSON answers each.
//   {"do": "meet", "address": A}                 dial A, identify and ping it
//   {"do": "echo", "address": A, "bytes": N}     send N bytes to A's echo and compare
// It serves ping, identify and the echo protocol itself. The first line it prints says who
// and where it is.
import { createInterface } from 'node:readline'
import { noise } from '@chainsafe/libp2p-noise'
import { yamux } from '@chainsafe/libp2p-yamux'
import { identify } from '@libp2p/identify'
import { ping } from '@libp2p/ping'
import { tcp } from '@libp2p/tcp'
import { byteStream } from '@libp2p/utils'
import { multiaddr } from '@multiformats/multiaddr'
import { createLibp2p } from 'libp2p'

const ECHO = '/test/echo/1'
const DEADLINE_MS = 20_000
const PART_BYTES = 100_000

const node = await createLibp2p({
  addresses: { listen: ['/ip4/127.0.0.1/tcp/0'] },
  transports: [tcp()],
  connectionEncrypters: [noise()],
  streamMuxers: [yamux()],
  services: { identify: identify(), ping: ping() }
})

await node.handle(ECHO, async (stream) => {
  const bytes = byteStream(stream)
  for (;;) {
    const part = await bytes.read()
    if (part === null) break
    await bytes.write(part)
  }
  await stream.close()
})

const signal = () => AbortSignal.timeout(DEADLINE_MS)

async function meet (address) {
  const identified = new Promise((resolve) => {
    node.addEventListener('peer:identify', (event) => resolve(event.detail), { once: true })
  })
  const connection = await node.dial(multiaddr(address), { signal: signal() })
  const { agentVersion, protocols } = await identified
  const pingMs = await node.services.ping.ping(connection.remotePeer, { signal: signal() })
  return { agentVersion, protocols, pingMs, muxer: connection.multiplexer }
}

async function echo (address, size) {
  const stream = await node.dialProtocol(multiaddr(address), ECHO, { signal: signal() })
  const bytes = byteStream(stream)
  const sent = new Uint8Array(size).map((_, index) => index % 251)
  const received = receive(bytes, size)
  for (let start = 0; start < size; start += PART_BYTES) {
    await bytes.write(sent.subarray(start, start + PART_BYTES), { signal: signal() })
  }
  const same = Buffer.compare(Buffer.from(await received), Buffer.from(sent)) === 0
  await stream.close()
  return { same }
}

async function receive (bytes, size) {
  const parts = []
  for (let left = size; left > 0;) {
    const part = await bytes.read({ bytes: Math.min(left, PART_BYTES), signal: signal() })
    parts.push(part.subarray())
    left -= part.byteLength
  }
  return Buffer.concat(parts)
}

const say = (line) => process.stdout.write(JSON.stringify(line) + '\n')
say({ peer: node.peerId.toString(), address: node.getMultiaddrs()[0].toString() })
for await (const line of createInterface({ input: process.stdin })) {
  const order = JSON.parse(line)
  try {
    say(order.do === 'meet' ? await meet(order.address) : await echo(order.address, order.bytes))
  } catch (error) {
    say({ error: `${error.name}: ${error.message}` })
  }
}
process.exit(0)
