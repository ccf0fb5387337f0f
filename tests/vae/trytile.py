import sys, traceback, time
import torch, torch.distributed as dist
from tests.dist.ranks import run_ranks
def work(names):
    torch.set_num_threads(1)
    import warnings; warnings.filterwarnings("ignore")
    from tests.vae.case import build, latents, picture, decode, encode, tile
    from tests.vae import zoo
    from parafuse.engine.vae.tiled import TiledAutoencoder
    out=[]
    for c in zoo.CASES:
        if c.unbuilt or c.tiles is None: continue
        if names and not any(n in c.name for n in names): continue
        m=tile(c,build(c))
        for op,fn,mk,has in (("dec",decode,latents,c.latents),("enc",encode,picture,c.picture)):
            if not has: continue
            for odd in (False,True):
                x=mk(c,odd=odd)
                try: want=fn(c,m,x)
                except Exception as e:
                    out.append(f"{c.name} {op} {odd} SERIAL FAILS {type(e).__name__} {str(e)[:80]}"); continue
                t=TiledAutoencoder("vae",m)
                t.install()
                try:
                    t0=time.time(); got=fn(c,m,x); dt=time.time()-t0
                    out.append(f"{c.name} {op} odd={odd} bitwise={torch.equal(got,want)} {dict(t.seen)} {dt:.2f}")
                except Exception as e:
                    tb=traceback.extract_tb(e.__traceback__)[-3:]
                    out.append(f"{c.name} {op} odd={odd} FAIL {type(e).__name__}: {str(e)[:230]} {tb[-1].filename[-40:]}:{tb[-1].lineno}")
                finally: t.remove()
    return out
if __name__=="__main__":
    r=run_ranks(work, int(sys.argv[1]), sys.argv[2:], timeout_s=500)
    print("\n".join(r[0]))
    for i,o in enumerate(r[1:]):
        for a,b in zip(r[0],o):
            if a.split("bitwise")[-1][:6]!=b.split("bitwise")[-1][:6]: print("rank",i+1,b)
