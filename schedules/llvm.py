"""Prototype"""
from __future__ import annotations
import math
from dataclasses import dataclass
from typing import Any
from tvm import tirx
from tvm.s_tir.schedule import _ffi_api

@dataclass(frozen=True, slots=True)
class Tiles:
    vector: str      # "channels" | "row"
    lanes: int
    vectors: int     # vectors in registers
    columns: int     # scalars in registers: columns (channels) or channels (row)
    rows: int        # rows of h in registers
    task: int        # channels a task

def phase_blocks(sch):
    root = sch.get_child_blocks(sch.get_sblock("root"))
    return [b for b in root if sch.get(b).name_hint.startswith("phase")]

def schedule(sch, spec, t: Tiles):
    G, Mg, Cg = spec.groups, spec.channels_out//spec.groups, spec.channels_in//spec.groups
    VL = t.lanes
    phases = phase_blocks(sch)
    as_axes = sch.get(phases[0]).name_hint == "phase" if phases else False
    nf = 3 if as_axes else 0
    pad, out = sch.get_sblock("pad"), sch.get_sblock("output")
    # --- layouts ---
    sch.transform_layout(pad, ("write",0), lambda n,g,c,d,h,w:(n,g,d,h,c,w))
    first = phases[0]
    wi = [i for i,r in enumerate(sch.get(first).reads) if r.source.name=="W"][0]
    block = VL if t.vector=="channels" else t.columns
    sch.transform_layout(first, ("read",wi), lambda c,m,kd,kh,kw:(c//Cg, m//block, kd,kh,kw, c%Cg, m%block))
    if t.vector=="channels":
        for p in phases:
            if as_axes:
                sch.transform_layout(p,("write",0),lambda n,g,m,a,b,c,d,h,w:(n,g,m//VL,a,b,c,d,h,w,m%VL))
            else:
                sch.transform_layout(p,("write",0),lambda n,g,m,d,h,w:(n,g,m//VL,d,h,w,m%VL))
    # --- tasks ---
    ncdhw = spec.layout=="NCDHW"
    loops = sch.get_loops(out)
    n,m,od,oh,ow = loops if ncdhw else (loops[0],loops[4],*loops[1:4])
    (qd,fd),(qh,fh),(qw,fw) = [sch.split(l,[None,len(a.phases)]) for l,a in zip((od,oh,ow),spec.axes)]
    g,mg = sch.split(m,[G,None])
    mo,mi = sch.split(mg,[None,t.task])
    qho,qhi = sch.split(qh,[None,t.rows])
    if ncdhw: order=(mi,fd,qhi,fh,qw,fw)
    else: order=(fd,qhi,fh,qw,fw,mi)
    sch.reorder(n,g,mo,qd,qho,*order)
    annotate_reads(sch,out,spec,t,as_axes)
    par = sch.fuse(n,g,mo,qd,qho)
    # --- phases ---
    for p in phases:
        sch.compute_at(p,par,preserve_unit_loops=True)
        L = sch.get_loops(p)[1:]
        assert len(L)==6+nf+4,(len(L))
        n_,g_,m_,*f_ = L[:3+nf]; d_,h_,w_ = L[3+nf:6+nf]; td,th,tw,c = L[-4:]
        if t.vector=="channels":
            m1,m2,v = sch.split(m_,[None,t.vectors,VL]); h1,h2=sch.split(h_,[None,t.rows]); w1,w2=sch.split(w_,[None,t.columns])
            sch.reorder(n_,g_,*f_,d_,m1,h1,w1,td,th,tw,c,h2,w2,m2,v)
            inner=[h2,w2,m2]
        else:
            m1,m2 = sch.split(m_,[None,t.columns]); h1,h2=sch.split(h_,[None,t.rows]); w1,w2,v=sch.split(w_,[None,t.vectors,VL])
            sch.reorder(n_,g_,*f_,d_,h1,w1,m1,td,th,tw,c,h2,m2,w2,v)
            inner=[h2,m2,w2]
        tile = m1 if t.vector=="row" else w1
        C = sch.cache_write(p,0,"local"); sch.reverse_compute_at(C,tile,preserve_unit_loops=True)
        sch.vectorize(v)
        for l in inner: sch.unroll(l)
        lc = sch.get_loops(C)
        k = len(sch.get_loops(p))
        depth = lc.index(tile) if False else None
        own = lc[-(7+nf):] if t.vector=="channels" else lc[-(6+nf):]
        if t.vector=="channels":
            # n,g,m,(f),d,h,w,v
            sch.vectorize(own[-1]); 
            for l in (own[2],*own[-3:-1]): sch.unroll(l)
        else:
            wv_o,wv=sch.split(own[-1],[None,VL]); sch.vectorize(wv); sch.unroll(wv_o)
            for l in (own[2],own[-2]): sch.unroll(l)
    sch.parallel(par)
    for p in phases:
        L = sch.get_loops(p)
        sch.decompose_reduction(p, L[-8])
    lo = sch.get_loops(out)
    return out,pad

def annotate_reads(sch,out,spec,t,as_axes):
    blk = sch.get(out); iv=[v.var for v in blk.iter_vars]
    n,m,od,oh,ow = iv if spec.layout=="NCDHW" else (iv[0],iv[4],*iv[1:4])
    Mg=spec.channels_out//spec.groups
    fd_,s=tirx.floordiv,[a.stride for a in spec.axes]
    dt=iv[0].ty.dtype
    one=lambda v:(v,v+1)
    def span(lo,size): return (lo,lo+size)
    mstart=fd_(tirx.floormod(m,Mg),t.task)*t.task
    hstart=fd_(fd_(oh,s[1]),t.rows)*t.rows
    for i,r in enumerate(blk.reads):
        if not r.source.name.startswith("phase"): continue
        shape=[int(x) for x in r.source.shape[1:]]
        f=[one(tirx.floormod(o,k)) for o,k in zip((od,oh,ow),s)] if as_axes else []
        wpad = shape[-2] if t.vector=="channels" else shape[-1]
        if as_axes: f=[one(tirx.floormod(od,s[0])),one(tirx.floormod(oh,s[1])),(tirx.const(0,dt),tirx.const(len(spec.axes[2].phases),dt))]
        ranges=[one(n),one(fd_(m,Mg))]
        if t.vector=="channels":
            ranges+=[span(fd_(mstart,t.lanes),t.task//t.lanes)]
        else: ranges+=[span(mstart,t.task)]
        ranges+=[*f,one(fd_(od,s[0])),span(hstart,t.rows),(tirx.const(0,dt),tirx.const(wpad,dt))]
        if t.vector=="channels": ranges.append((tirx.const(0,dt),tirx.const(t.lanes,dt)))
        im=tirx.IndexMap(initial_indices=iv,final_indices=[x for p in ranges for x in p],inverse_index_map=None)
        _ffi_api.ScheduleAnnotateBufferAccess(sch,out,i,0,im)
