// Run an artifact for Metal on a Mac: swift metal_run.swift DIR Y_BYTES [BATCH]
//
// It reads x.bin, w.bin (packed) and b.bin in DIR, and writes y.bin there; all are the tensors' bytes.
// BATCH is that of an open N.
import Foundation
import Metal

struct Launch: Decodable {
  let kernel: String
  let grid: [Int?]
  let block: [Int]
  let blocks_per_image: Int
  let arguments: [String]
}

let place = URL(fileURLWithPath: CommandLine.arguments[1])
let yBytes = Int(CommandLine.arguments[2])!
var batch = Int64(CommandLine.arguments.count > 3 ? CommandLine.arguments[3] : "1")!
let launch = try JSONDecoder().decode(Launch.self, from: Data(contentsOf: place.appendingPathComponent("launch.json")))

let device = MTLCreateSystemDefaultDevice()!
let options = MTLCompileOptions()
options.fastMathEnabled = false  // the error bound holds for IEEE arithmetic
let text = try String(contentsOf: place.appendingPathComponent("kernel.metal"), encoding: .utf8)
let library = try device.makeLibrary(source: text, options: options)
let pipeline = try device.makeComputePipelineState(function: library.makeFunction(name: launch.kernel)!)
let most = pipeline.maxTotalThreadsPerThreadgroup
precondition(launch.block.reduce(1, *) <= most, "this GPU runs at most \(most) threads of the kernel in a threadgroup")

let result = device.makeBuffer(length: yBytes, options: .storageModeShared)!
let command = device.makeCommandQueue()!.makeCommandBuffer()!
let encoder = command.makeComputeCommandEncoder()!
encoder.setComputePipelineState(pipeline)
for (index, name) in launch.arguments.enumerated() {
  if name == "batch" {
    encoder.setBytes(&batch, length: 8, index: index)
  } else if name == "y" {
    encoder.setBuffer(result, offset: 0, index: index)
  } else {
    let content = try Data(contentsOf: place.appendingPathComponent(name + ".bin"))
    let buffer = content.withUnsafeBytes { device.makeBuffer(bytes: $0.baseAddress!, length: content.count)! }
    encoder.setBuffer(buffer, offset: 0, index: index)
  }
}
let blocks = (launch.grid[0] ?? nil) ?? launch.blocks_per_image * Int(batch)
encoder.dispatchThreadgroups(
  MTLSize(width: blocks, height: 1, depth: 1),
  threadsPerThreadgroup: MTLSize(width: launch.block[0], height: launch.block[1], depth: launch.block[2]))
encoder.endEncoding()
command.commit()
command.waitUntilCompleted()
if let error = command.error { throw error }
try Data(bytes: result.contents(), count: yBytes).write(to: place.appendingPathComponent("y.bin"))
